"""Who answers: a run's tuned model beside its base, or several runs' adapters on one base, or a blend of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ftrun import assemble
from ftrun.compose import compose
from ftrun.errors import UserError, unknown
from ftrun.evals.generation import Meet
from ftrun.job import Job
from ftrun.memory.host import keep_pages
from ftrun.methods.blend import Blend, blend
from ftrun.methods.files import hashes, load_adapter
from ftrun.methods.mixed import Adapter, Mix
from ftrun.models.forward import attention
from ftrun.models.fuse import fuse
from ftrun.models.load import fill
from ftrun.runs import cache_dir, job_file, read_json
from ftrun.tasks import blending
from ftrun.tasks.prompts import BASE, Frame, Prompt
from ftrun.tasks.tuned import Tuned, here, open_tuned

Say = Callable[[str], None]


class Speakers(Protocol):
    """names: whose answers can be had, the base's apart. together: whether one batch may ask several of them."""

    job: Job
    tokenizer: Any
    names: tuple[str, ...]
    together: bool

    @property
    def model(self) -> Any:
        """The model that answers, within `speaking`."""

    def speaking(self, names: Sequence[str]) -> contextlib.AbstractContextManager[Meet | None]:
        """For a while the model's rows are answered by these, one a row ("base": the untuned model); gives what is to
        be told which of the rows are left.
        """

    def ids(self, name: str, prompt: Prompt, raw: bool) -> list[int]:
        """The tokens of a prompt as this one reads it, its virtual ones in front."""


class One:
    """A finished run: "tuned" and "base"."""

    together = False
    names: tuple[str, ...] = ("tuned",)

    def __init__(self, run: Path, job: Job, scale: float, say: Say) -> None:
        self.run, self.scale, self.cache, self.say = run, scale, cache_dir(), say
        self.tuned: Tuned = open_tuned(run, job, self.cache, say)
        self.plain: Tuned | None = None  # of a method that changed the base
        self.job, self.tokenizer = job, self.tuned.tokenizer
        self.frame = Frame(job, self.tokenizer)
        with self.tuned.scaled(scale):
            pass  # a scale that cannot be is said before anything is asked

    @property
    def model(self) -> Any:
        return self.tuned.model if self.plain is None else self.plain.model

    @contextlib.contextmanager
    def speaking(self, names: Sequence[str]) -> Iterator[Meet | None]:
        tuned = self.tuned
        if set(names) != {BASE}:
            self.plain = None
            with tuned.scaled(self.scale), tuned.generating(), tuned.tuner.settled(tuned.model):
                yield None
        elif tuned.tuner.switchable:
            with tuned.generating(), tuned.base():
                yield None
        else:
            self.plain = self.plain or open_tuned(self.run, self.job, self.cache, self.say, tuned=False)
            with self.plain.generating():
                yield None

    def ids(self, name: str, prompt: Prompt, raw: bool) -> list[int]:
        count = 0 if name == BASE else self.tuned.tuner.prefix
        return [*_virtual(self.tuned.model, count), *self.frame.ids(prompt, raw)]


class Several:
    """Runs' adapters on one base. job: the first run's, whose base it is. weights: their blend is one more adapter."""

    together = True

    def __init__(
        self, runs: Mapping[str, str], job: Job, scale: float, weights: Mapping[str, float], rank: int | None, say: Say
    ) -> None:
        _check(runs, weights)
        self.runs = {name: Path(run).expanduser() for name, run in runs.items()}
        self.drifts: dict[str, list[str]] = {}
        self.job, cache, device = job, cache_dir(), assemble.torch_device(here(job))
        if device.type == "cpu":
            keep_pages()
        jobs = {name: compose([f"job={_finished(run)}"]) for name, run in self.runs.items()}
        self.parts = assemble.sketch(job, cache, say, whole=True)
        self.model, self.tokenizer = self.parts.model, self.parts.base.tokenizer()
        self.frames: dict[str, Frame] = {}
        adapters: list[Adapter] = []
        fill(self.model, self.parts.base, self.parts.quantiser, device, cache, say)
        if job.kernels == "fast":
            fuse(self.model)
        for name, one in jobs.items():
            adapters.append(self._adapter(name, self.runs[name] / "adapter", one, say))
            adapters[-1].tuner.scale(adapters[-1].wrappers, scale)
        self.blend: Blend | None = None
        if weights:
            self.blend = blend(self.model, adapters, weights, rank)
            adapters = [self.blend.adapter]
        self.mix = Mix(self.model.eval(), adapters)
        self.names = tuple(self.mix.adapters)

    def _adapter(self, name: str, folder: Path, job: Job, say: Say) -> Adapter:
        options = job.method.typed()
        found = assemble.find_anatomy(
            self.model, getattr(options, "targets", None) or "all", getattr(options, "layers", "all")
        )
        made = Adapter(name, job.method.load().Tuner(options), self.model, found, self.job.kernels)
        config, tensors = load_adapter(folder)
        self.frames[name] = Frame(job, self.tokenizer)
        own, allowed = self.tokenizer.chat_template, dataclasses.replace(job, allow_drift=self.job.allow_drift)
        self.drifts[name] = assemble.check_provenance(allowed, self.parts, folder, say)
        self.tokenizer.chat_template = own
        made.load(config, tensors)
        return made

    @contextlib.contextmanager
    def speaking(self, names: Sequence[str]) -> Iterator[Meet | None]:
        rows = [None if name == BASE else name for name in names]

        def meet(left: Sequence[int]) -> None:
            self.mix.assign([rows[i] for i in left])

        with attention(self.model, "sdpa"), torch.no_grad():
            yield meet

    def ids(self, name: str, prompt: Prompt, raw: bool) -> list[int]:
        count = 0 if name == BASE else self.mix.prefix(name)
        frame = self.frames.get(name) or next(iter(self.frames.values()))
        return [*_virtual(self.model, count), *frame.ids(prompt, raw)]

    def save(self, folder: Path, weights: Mapping[str, float], scale: float) -> dict[str, Any]:
        """The blend as a run's folder; what it was made of. Raises UserError as `blending.save` does."""
        assert self.blend is not None
        made, tokenizer = self.blend, self.tokenizer
        of = {name: {"path": str(self.runs[name]), **self._origin(name)} for name in weights}
        record = {"adapters": of, "weights": weights, "scale": scale, "rank": made.rank, "kept": made.kept}
        own, tokenizer.chat_template = tokenizer.chat_template, next(iter(self.frames.values())).template
        try:
            blending.save(folder, self.job, self.parts, made, record)
        finally:
            tokenizer.chat_template = own
        return record

    def _origin(self, name: str) -> dict[str, Any]:
        drifts = self.drifts[name]
        return {"files": hashes(self.runs[name] / "adapter"), **({"drifts": drifts} if drifts else {})}


def _check(runs: Mapping[str, str], weights: Mapping[str, float]) -> None:
    if BASE in runs:
        raise UserError(f"adapters: {BASE!r} is the untuned model's own name; name the adapter otherwise")
    for name in weights:
        if name not in runs:
            raise UserError(unknown("blend: the adapter", name, runs))


def _finished(run: Path) -> Path:
    """The job.yaml of a run that holds an adapter. UserError where it does not."""
    found = job_file(run)
    if not (run / "adapter").is_dir():
        status = (read_json(run / "result.json") or {}).get("status", "not at its end")
        why = "it trained the base's own weights" if (run / "model").is_dir() else f"it is {status}"
        raise UserError(f"adapters: {run}: holds no adapter: {why}")
    return found


def _virtual(model: Any, count: int) -> list[int]:
    first = model.get_input_embeddings().weight.shape[0]
    return list(range(first, first + count))
