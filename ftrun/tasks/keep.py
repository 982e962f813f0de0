"""What one run keeps: its checkpoints on the way, and at the end the adapter or the model that it hands over."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError

from ftrun import assemble
from ftrun.assemble import Sketch
from ftrun.data.load import Corpus
from ftrun.data.rows import Rows
from ftrun.errors import RunFailed, UserError
from ftrun.job import Job
from ftrun.methods.files import hashes, save_adapter
from ftrun.optim import state as optimiser_state
from ftrun.optim.layout import fitted
from ftrun.runs import Run, aside, listed, write_json
from ftrun.train import checkpoint
from ftrun.train.aside import Aside
from ftrun.train.checkpoint import Checkpoint
from ftrun.train.generators import restore_of_each, seed_rank, state_of_each
from ftrun.train.loop import Progress, Work
from ftrun.train.parallel import cut_as, gathered, held_whole
from ftrun.train.ranks import Ranks


class Keeper:
    """belongs: what the run's weights belong to, by hash; a checkpoint that belongs to another is refused."""

    def __init__(self, run: Run, job: Job, parts: Sketch, corpus: Corpus, say: Callable[[str], None]) -> None:
        self.run, self.job, self.parts, self.say = run, job, parts, say
        self.records: Callable[[], dict[str, bytes]] = dict  # the metrics so far, by file
        self._writing, self._of, self._progress = Aside(), 0, Progress()
        self.belongs = {"base": parts.base.hash(), "data": fingerprint(corpus)}

    def found(self, resume: str, ranks: Ranks = Ranks()) -> Checkpoint | None:  # noqa: B008 (frozen)
        """The newest whole checkpoint; of several ranks the first one chooses it. Raises UserError where it belongs to
        another base or other rows, and on all ranks where one of them does not see what the first one does.
        """
        found, mark = None, None
        with ranks.together():
            if ranks.first:
                found = self._newest(resume)
                mark = found and checkpoint.mark(self.run.checkpoints, found.progress.step)
        first = ranks.told({"belongs": self.belongs, "step": found and found.progress.step, "mark": mark})
        with ranks.together():
            if not ranks.first:
                found = self._same(first, f"rank {ranks.rank} on {socket.gethostname()}")
        return found

    def _same(self, first: Mapping[str, Any], where: str) -> Checkpoint | None:
        """The checkpoint that the first rank goes on from, as it lies here."""
        for what in (what for what, digest in self.belongs.items() if digest != first["belongs"][what]):
            raise UserError(f"{where} has another {what} than the first rank: expected the same on all machines")
        if first["step"] is None:
            return None
        path, shared = self.run.checkpoints / f"step-{first['step']}", "the run's folder must be one that all share"
        try:
            if checkpoint.mark(self.run.checkpoints, first["step"]) == first["mark"]:
                return checkpoint.load(path)
        except (OSError, UserError) as error:
            raise UserError(f"{path}: {where} does not see it ({reason(error)}): {shared}") from error
        raise UserError(f"{path}: {where} sees another one than the first rank: {shared}")

    def _newest(self, resume: str) -> Checkpoint | None:
        found = checkpoint.latest(self.run.checkpoints, self.say)
        if found is None:
            return None
        changes = [(k, v[:16], self.belongs[k][:16]) for k, v in found.belongs.items() if v != self.belongs.get(k, v)]
        if changes and resume != "force":
            where = {"base": self.parts.base.reference, "data": "the rows"}
            named = ", ".join(f"{k} ({where[k]})" for k, *_ in changes if k in where)
            raise UserError(
                f"out={self.run.path}: since the run began, this has changed: {named}.\n{listed(changes)}\n"
                "Name another out, or resume=force"
            )
        if changes:
            self.say(f"resume=force: goes on with another {' and '.join(k for k, *_ in changes)}")
        return found

    def restore(self, found: Checkpoint, work: Work) -> None:
        """The optimiser and the generators as they were; the trained weights are in the model already."""
        try:
            known = assemble.layouts(self.job, self.parts)
            own = work.parallel.layout(known)
            tensors, meta, exact = fitted(found.optimiser, found.optimiser_meta, own, known, work.optimiser)
            optimiser_state.restore(work.optimiser, tensors, meta)
        except ValueError as error:
            raise UserError(f"{self.run.checkpoints}: {error}") from error
        if work.ranks.any(not exact):
            self.say("saved in other parts: 8-bit optimiser state that they cut is quantised anew, which is not exact")
        if restore_of_each(found.random, work.ranks):
            return
        seed_rank(self.job.seed, found.progress.step, work.ranks)
        if getattr(self.parts.tuner.options, "dropout", 0.0):
            self.say(
                f"saved on another number of devices than {work.ranks.world}: dropout draws other masks from here on"
            )

    def load_trained(self, tensors: dict[str, torch.Tensor]) -> None:
        """Trained weights into the model, sharded or whole."""
        tuner, model = self.parts.tuner, self.parts.model
        own = {name: trained.parameter for name, trained in tuner.named(model).items()}
        tuner.load_state(model, {name: cut_as(tensor, own.get(name)) for name, tensor in tensors.items()})

    def load_best(self, ranks: Ranks = Ranks()) -> bool:  # noqa: B008 (frozen)
        """The best weights into the model, on all ranks; False, said aloud, where one of them finds none whole."""
        found, why = None, "another rank does not see the best weights"
        try:
            found = checkpoint.load(self.run.checkpoints / "best")
        except UserError as error:
            why = str(error)
        if ranks.any(found is None) or found is None:
            self.say(f"warning: {why}; the last step's weights are handed over")
            return False
        self.load_trained(found.trained)
        return True

    def save(self, work: Work, progress: Progress, name: str | None = None) -> str | None:
        """A checkpoint; tells what went wrong, which ends no run. Raises RunFailed where a weight is not finite.

        Of several ranks all take part, and the first one writes.
        """
        state, trouble = self._state(work, progress), None
        if work.ranks.first:
            self.finish()
            try:
                checkpoint.save(self.run.checkpoints, state, name, self.job.save_last)
            except (OSError, SafetensorError) as error:
                trouble = self._not_saved(name or f"step-{progress.step}", progress.step, error)
        # all ranks go on, or none
        return trouble or ("the first rank could not write it" if work.ranks.any(trouble is not None) else None)

    def save_aside(self, work: Work, progress: Progress) -> str | None:
        """A checkpoint from a copy, written while training goes on; `tell` or `finish` says what went wrong with it."""
        state = self._state(work, progress)
        if not work.ranks.first:
            return None
        self.finish()
        state = checkpoint.copied(state)
        self._of, self._progress = progress.step, progress
        self._writing.begin(lambda: checkpoint.save(self.run.checkpoints, state, last=self.job.save_last))
        return None

    def tell(self) -> None:
        """Say what went wrong with a checkpoint, where it is done. Waits for none."""
        if not self._writing.busy:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written; say what went wrong with it."""
        error = self._writing.finish()
        if error is not None:
            self._progress.saves -= 1
            self._not_saved(f"step-{self._of}", self._of, error)

    def _not_saved(self, name: str, step: int, error: Exception) -> str:
        trouble = f"{self.run.checkpoints / name}: {reason(error)}"
        self.say(f"WARNING: NO CHECKPOINT of step {step}: {trouble}. The run goes on without it")
        return trouble

    def _state(self, work: Work, progress: Progress) -> Checkpoint:
        trained = {key: held_whole(tensor) for key, tensor in self.parts.tuner.state(self.parts.model).items()}
        for key, tensor in trained.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise RunFailed(
                    f"step {progress.step}: {key} is no longer finite; a lower lr may help. Nothing is saved"
                )
        tensors, meta = work.parallel.joined(*optimiser_state.flatten(work.optimiser), _known(work))
        files = self._files() if work.ranks.first else {}
        return Checkpoint(progress, trained, tensors, meta, state_of_each(work.ranks), self.belongs, files)

    def _files(self) -> dict[str, bytes]:
        """The job, the plan and the metrics as they are now."""
        job, plan = self.run.path / "job.yaml", self.run.path / "plan.json"
        made = {plan.name: plan.read_bytes()} if plan.is_file() else {}
        if job.is_file():
            content = yaml.safe_load(job.read_text(encoding="utf-8"))
            made["job.json"] = json.dumps(content, indent=2, default=str).encode()
        return made | self.records()

    def hand_over(self, provenance: Mapping[str, Any], ranks: Ranks = Ranks()) -> None:  # noqa: B008 (frozen)
        """adapter/ with its provenance, or model/ where the base itself was trained: whole, or not at all.

        Of several ranks all take part, and the first one writes.
        """
        parts = self.parts
        config = parts.tuner.adapter_config(parts.anatomy, parts.base.reference)
        whole = None if config else gathered(parts.model, keeps=ranks.first)
        if ranks.first:
            self._hand_over(config, whole, provenance)
        ranks.wait()

    def _hand_over(
        self, config: dict[str, Any], whole: dict[str, torch.Tensor] | None, provenance: Mapping[str, Any]
    ) -> None:
        parts = self.parts
        target = self.run.path / ("adapter" if config else "model")
        try:
            with aside(target) as beside:
                if config:
                    save_adapter(beside, config, parts.tuner.state(parts.model))
                else:
                    self._save_model(beside, whole or {})
                facts = {**provenance, "data": self.belongs["data"], "files": hashes(beside)}
                write_json(beside / "provenance.json", facts)
        except (OSError, SafetensorError) as error:
            saved = self.run.checkpoints.exists() and any(self.run.checkpoints.glob("step-*"))
            kept = f"; the trained weights are in {self.run.checkpoints}, the same command tries again" if saved else ""
            raise RunFailed(f"{target}: cannot be written: {reason(error)}{kept}") from error

    def _save_model(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        from transformers.utils import logging

        # its bar would break into what the console shows, and into redirected output
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self.parts.model.save_pretrained(folder, state_dict=tensors)
        finally:
            if shown:
                logging.enable_progress_bar()
        assemble.saved_config(self.parts).save_pretrained(folder)
        self.parts.base.tokenizer().save_pretrained(folder)


def _known(work: Work) -> list[torch.Tensor]:
    """The optimiser's parameters, in the order of its state."""
    return [parameter for group in work.optimiser.param_groups for parameter in group["params"]]


def fingerprint(corpus: Corpus) -> str:
    """SHA-256 over the rows in their order: what is trained and what is held out."""
    total = hashlib.sha256()
    for rows in (corpus.train, corpus.held_out):
        total.update(_hashes(rows).tobytes())
        total.update(rows.supervised.tobytes())
    return total.hexdigest()


def _hashes(rows: Rows) -> np.ndarray:
    made = np.zeros(len(rows), np.uint64)
    for i, source in enumerate(rows.sources):
        mine = rows.part == i
        made[mine] = getattr(source, "hash")[rows.row[mine]]  # noqa: B009 (every stored source has it)
    return made


def reason(error: Exception) -> str:
    """What the system said, in one line."""
    return str(getattr(error, "strerror", None) or error).splitlines()[0]
