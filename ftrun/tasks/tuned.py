"""A finished run, opened again: its base and what it learnt, checked to belong together, and the rows it was given."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ftrun import assemble, stepping
from ftrun.compose import changed
from ftrun.data.load import Corpus
from ftrun.errors import UserError
from ftrun.job import Job, make_part
from ftrun.memory.device import Device, resolve
from ftrun.memory.host import keep_pages
from ftrun.models.forward import TokenLoss, attention
from ftrun.runs import check_finished
from ftrun.values import Batch

Say = Callable[[str], None]


class Tuned:
    """A run's model, ready to be asked: on the job's device, dropout off, the adapter at the scale it was trained at.

    job: the run's, with the command line's changes. parts: its sketch (base, model, anatomy, tuner, quantiser). device:
    torch's. drifts: in what the base is another than in training, where that is allowed. `base` gives the untuned model
    for a while. Of method=full, tuned=False opens the base itself instead.
    """

    def __init__(
        self,
        run: Path,
        job: Job,
        parts: assemble.Sketch,
        device: torch.device,
        cache: Path,
        say: Say,
        drifts: Sequence[str],
    ) -> None:
        self.drifts = list(drifts)
        self.run, self.job, self.parts, self.device, self.cache, self.say = run, job, parts, device, cache, say
        self.model = parts.model.eval()
        self.tokenizer = parts.base.tokenizer()
        self.tuner = parts.tuner
        self.autocast = assemble.autocast(parts, device)
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The job's rows, tokenised."""
        return assemble.rows(self.job, self.parts, self.cache, self.say)

    @property
    def micro_batch(self) -> int:
        """Rows at once: the job's, or, where the plan chose, what its batch divides into eights."""
        asked = self.job.micro_batch
        return asked if isinstance(asked, int) else min(self.job.batch, 8)

    def let_go(self) -> None:
        """Frees the model's memory; only the rows can be asked for after that."""
        self.__dict__.pop("token_loss", None)
        self.model = self.parts.model = None

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """The base alone, for a while. Raises UserError where the method changed it (method=full)."""
        with self.tuner.disabled(self.model):
            yield

    @contextlib.contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """So much of the update, for a while: 1 as trained, 0 the base. UserError where there is no in-between."""
        self.tuner.scale(self.model, factor)
        try:
            yield
        finally:
            self.tuner.scale(self.model, 1.0)

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """As generation runs the model: with a cache, which packed attention does not know; no gradient."""
        with attention(self.model, "sdpa"), self.autocast(), torch.no_grad():
            yield

    @functools.cached_property
    def token_loss(self) -> TokenLoss:
        """The job's own loss."""
        return TokenLoss(self.model, self.job.kernels, self.job.loss_chunk)

    def loss(self, batch: Batch) -> torch.Tensor:
        """The sum of a batch's losses in nats, as in training."""
        with self.autocast():
            return self.token_loss(batch.to(self.device))

    def held_out(self, rows: int | None) -> Sequence[Batch]:
        """The held-out rows, at most so many, as batches."""
        return stepping.evaluation_batches(self.job, self.corpus, rows, self.micro_batch, self.pad_id)


def open_tuned(run: Path, job: Job, cache: Path, say: Say, *, plain: bool = False, tuned: bool = True) -> Tuned:
    """The model of a finished run. job: the run's own, with changes on top.

    plain: over the base in its own dtype, whatever the run quantised it to. tuned: false of a method that changes the
    base itself gives that base. Raises UserError where the run is not at its end, lies on another base than the one at
    hand (unless the job has allow_drift), or its device is not here.
    """
    check_finished(run)
    device = assemble.torch_device(here(job))
    if device.type == "cpu":
        keep_pages()
    whole = (run / "model").is_dir()
    if plain:
        job = unquantised(job)
    drifts: list[str] = []
    if whole and tuned:
        checked = assemble.sketch(job, cache, say, whole=True)
        drifts = assemble.check_provenance(job, checked, run / "model", say)
        job = changed(job, [f"model.path={run / 'model'}", "model.source=folder", "model.new_tokens=[]"])
    elif not whole:
        job = replaced(job, "method", from_=str(run / "adapter"))
    parts = assemble.sketch(job, cache, say, whole=True)
    assemble.furnish(job, parts, device, cache, say, recomputed=0, expects_scheme=not plain)
    return Tuned(run, job, parts, device, cache, say, drifts or parts.drifts)


def here(job: Job) -> Device:
    """The job's device. Raises UserError where it is not on this machine."""
    device = resolve(job.device.typed())
    if not device.present:
        raise UserError(f"device={job.device.choice}: {device.name} is not on this machine; device=auto takes what is")
    return device


def unquantised(job: Job) -> Job:
    """The same job over the base as its files have it."""
    return dataclasses.replace(job, quant=make_part("quant", {"kind": "none"}, "none", {}))


def replaced(job: Job, group: str, **options: Any) -> Job:
    """The job with other options of one group."""
    part = getattr(job, group)
    made = dataclasses.replace(part, options=dataclasses.replace(part.options, **options))
    return dataclasses.replace(job, **{group: made})
