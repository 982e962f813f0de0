"""What the jobs of one process have in common, made once; and what a study wants of a run on its way.

A plain run makes all of it once as well: there is one way through, whatever runs before or after.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ftrun import assemble
from ftrun.data.load import Corpus
from ftrun.job import Job, Part
from ftrun.memory.cost import Cost
from ftrun.memory.device import Device, resolve
from ftrun.models.base import Base
from ftrun.models.warm import Shelf
from ftrun.planning.advice import Advisor, advise
from ftrun.planning.keeping import keeping_notes, kept_before, settle_keeping
from ftrun.planning.settle import Settled, Worst, as_before, notes, refusal, settle_sharing, supply_of
from ftrun.planning.twin import Twin
from ftrun.values import EvalRecord

Say = Callable[[str], None]
_CORPORA = 4  # token sets kept at once


@dataclass(frozen=True)
class Prepared:
    """A job's plan, what is to be said of it, and, where it does not fit, why not and what would."""

    settled: Settled
    notes: tuple[str, ...]
    refusal: Callable[[], str]
    work: Cost | None  # of the planned step, where it was counted


class Shared:
    """What was made for one job and serves the next. keeps: the base's weights too, on the device; counts: see Twin."""

    def __init__(self, keeps: bool = False, counts: bool = False) -> None:
        self.shelf = Shelf() if keeps else None
        self.counts = counts
        self._bases: dict[str, Base] = {}
        self._rows: dict[str, tuple[Corpus, list[str]]] = {}  # with what there was to say of them
        self._devices: dict[str, Device] = {}
        self._prepared: dict[str, Prepared] = {}

    def device(self, job: Job) -> Device:
        """What one of the job's processes has of its device."""
        return self.whole_device(job).shared_by(job.devices)

    def whole_device(self, job: Job) -> Device:
        """The job's device, as it was when it was first asked for: before anything of ours lay on it."""
        return self._devices.setdefault(_key(job.device), resolve(job.device.typed()))

    def take_for(self, job: Job, kind: str, free_bytes: int) -> None:
        """The job's device as another process has found it, before anything of the study lay on it."""
        device = resolve(job.device.typed())
        if device.type == kind and device.present:
            self._devices[_key(job.device)] = replace(device, free_bytes=min(free_bytes, device.total_bytes))

    def sketch(self, job: Job, cache: Path, say: Say) -> assemble.Sketch:
        """The job's model before its weights, of a base that was opened once."""
        parts = assemble.sketch(job, cache, say, whole=True, base=self._bases.get(_key(job.model)))
        self._bases[_key(job.model)] = parts.base
        return parts

    def rows(self, job: Job, parts: assemble.Sketch, cache: Path, say: Say) -> Corpus:
        """The job's rows, tokenised once."""
        key = "|".join(map(str, (_key(job.data), _key(job.model), job.seq_len, parts.tuner.prefix, job.seed)))
        if key not in self._rows:
            said: list[str] = []
            found = assemble.rows(job, parts, cache, said.append)
            self._rows = {**dict(list(self._rows.items())[1 - _CORPORA :]), key: (found, said)}
        corpus, said = self._rows[key]
        for text in said:  # each run's log has it
            say(text)
        return corpus

    def prepared(
        self, job: Job, parts: assemble.Sketch, corpus: Corpus, device: Device, pad_id: int, total: int, out: Path
    ) -> Prepared:
        """The job's plan, made once."""
        earlier = kept_before(out)
        key, before = f"{job.key} {job.refuse} {earlier}", as_before(job, out)
        key += "" if before is job else f" {before.micro_batch} {before.checkpointing}"
        if key not in self._prepared:
            supply = supply_of(corpus, pad_id, total)
            found = prepare(before, parts, supply, device, "data", out, earlier, self.counts)
            if before is not job and not found.settled.plan.fits:
                found = prepare(job, parts, supply, device, "data", out, earlier, self.counts)
                now = f"{found.settled.micro_batch} rows at once, {found.settled.recomputed} layers recomputed"
                note = f"warning: less memory is free than when the run began: it goes on with {now}"
                found = replace(found, notes=(*found.notes, note))
            self._prepared[key] = found
        return self._prepared[key]


def prepare(
    job: Job,
    parts: assemble.Sketch,
    supply: Callable[[Job], Worst],
    device: Device,
    source: str,
    out: Path | None = None,
    earlier: dict[str, Any] | None = None,
    counts: bool = False,
) -> Prepared:
    """The plan of a job on its device, with what is to be said of it."""

    def attempt(strategy: str) -> tuple[Twin, Settled]:
        twin = Twin(job, parts, device, counts=counts, strategy=strategy)
        return twin, settle_keeping(job, twin, supply, device, source, out, earlier)

    twin, settled = settle_sharing(job, attempt)
    work = twin.step(settled.batches, settled.recomputed, settled.kept.keeps).cost if counts else None
    said = (*notes(job, twin), *keeping_notes(job, settled, twin.below))
    if settled.plan.fits:
        return Prepared(settled, said, lambda: "", work)

    @functools.cache
    def why() -> str:
        return f"{refusal(settled, device)}. {advise(Advisor(job, twin, settled, supply, device))}"

    return Prepared(settled, said, why, work)


class Watch:
    """What a study wants of a run. until: steps after which it is left, with a checkpoint. rungs: steps at which it is
    evaluated besides. verdict: hears each evaluation on the way; where it says False, the run is left there.
    """

    def __init__(
        self,
        until: int | None = None,
        rungs: frozenset[int] = frozenset(),
        verdict: Callable[[int, float], bool] = lambda step, loss: True,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.until, self.rungs, self._verdict, self._stopped = until, rungs, verdict, stopped
        self.pruned = False

    def evaluated(self, record: EvalRecord) -> None:
        """An evaluation between the first step and the last."""
        if record.step and not self._verdict(record.step, record.loss):
            self.pruned = True

    def halts(self, step: int) -> bool:
        """Whether the run is left after this step."""
        return self.pruned or self._stopped() or (self.until is not None and step >= self.until)


def _key(part: Part) -> str:
    """What is the same for equal options of the same kind."""
    options = json.dumps(asdict(part.options), sort_keys=True, default=str)
    return f"{part.choice} {part.kind} {options}"
