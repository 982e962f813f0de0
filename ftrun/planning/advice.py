"""What would make a job smaller: each change planned like the job itself, with what it saves and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ftrun import assemble
from ftrun.compose import changed
from ftrun.errors import UserError
from ftrun.job import Job
from ftrun.memory.device import Device
from ftrun.planning.plan import Kept, Plan
from ftrun.planning.settle import Settled, Worst, layer_counts, planned
from ftrun.planning.twin import Twin
from ftrun.runs import cache_dir

_OF_THE_STEP = ("micro_batch", "checkpointing", "seq_len", "keep_prefix")  # keys that leave the model as it is
# what a change touches, the least first; up to checkpointing the result stays as it is
_GENTLE = (
    "kernels",
    "keep_prefix",
    "micro_batch",
    "checkpointing",
    "optim",
    "model.dtype",
    "quant",
    "rank",
    "seq_len",
    "layers",
    "method",
)
_LOOKED_AT = 4  # changes that are planned: those that promise most


@dataclass(frozen=True)
class Change:
    """A change of one thing: what to type, what it costs, and a first guess at what it saves, in bytes."""

    override: str
    cost: str
    promise: float


@dataclass(frozen=True)
class Saving:
    """A change, planned: what the device then has to hold, and how much less that is."""

    override: str
    cost: str
    needed_bytes: int
    saved_bytes: int
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return dataclasses.asdict(self)


class Advisor:
    """Plans changes of a settled job. worst: the worst step of a job, for those that change what a step holds."""

    def __init__(self, job: Job, twin: Twin, settled: Settled, worst: Callable[[Job], Worst], device: Device) -> None:
        self.job, self.twin, self.settled, self.worst, self.device = job, twin, settled, worst, device

    def savings(self, count: int = 3) -> list[Saving]:
        """The `count` changes that save most, the greatest first."""
        chosen = sorted(self._changes(), key=lambda c: -c.promise)[:_LOOKED_AT]
        found = [saving for change in chosen if (saving := self._plan(change))]
        return sorted((s for s in found if s.saved_bytes > 0), key=lambda s: -s.saved_bytes)[:count]

    def nearest(self) -> tuple[list[str], Plan] | None:
        """A short list of changes that fits, the gentlest that do; None where none does."""
        overrides: list[str] = []
        at = self
        for _ in range(6):
            found = [s for change in at._changes() if (s := at._plan(change)) and s.saved_bytes > 0]
            if not found:
                return None
            best = _gentlest(found)
            overrides = [*(o for o in overrides if _key(o) != _key(best)), best]
            at = self._after(overrides)
            if at.settled.plan.fits:
                return overrides, at.settled.plan
        return None

    def _after(self, overrides: Sequence[str]) -> Advisor:
        job = self._job(overrides)
        alike = all(_key(override) in _OF_THE_STEP for override in overrides)
        twin = self.twin if alike else Twin(job, assemble.sketch(job, cache_dir(), lambda text: None), self.device)
        rows, layers = self._rows(job), self._layers(job, twin)
        made = planned(twin, self.worst(job), self.device, rows, layers, kept=self._kept(job, twin))
        return Advisor(job, twin, made, self.worst, self.device)

    def _plan(self, change: Change) -> Saving | None:
        try:
            after = self._after([change.override])
        except UserError:
            return None  # the change does not suit this job: a method without ranks, a model without that quantiser
        made = after.settled.plan
        saved = self.settled.plan.needed_bytes - made.needed_bytes
        return Saving(change.override, change.cost, made.needed_bytes, saved, made.fits)

    def _job(self, overrides: Sequence[str]) -> Job:
        keep = [f"micro_batch={self.settled.micro_batch}", f"checkpointing={self.settled.recomputed}"]
        given = set(map(_key, overrides))
        return changed(self.job, [*(k for k in keep if _key(k) not in given), *overrides])

    def _rows(self, job: Job) -> int:
        return job.micro_batch if isinstance(job.micro_batch, int) else self.settled.micro_batch

    def _layers(self, job: Job, twin: Twin) -> int:
        return self.settled.recomputed if job.checkpointing == "auto" else layer_counts(job, twin.graphs)[0]

    def _kept(self, job: Job, twin: Twin) -> Kept:
        """What the changed job keeps of its frozen layers: what this one does, or what it asks for."""
        kept = self.settled.kept
        if not twin.below or not kept.keeps or job.keep_prefix == "none":
            return Kept()
        return dataclasses.replace(kept, where="disk") if job.keep_prefix == "disk" else kept

    def _changes(self) -> Iterator[Change]:
        """What can be asked of this job, with what it promises: shares of what is there at the peak."""
        job, there = self.job, self.settled.plan.at_peak
        step = there["activations"] + there["logits"] + there["batch"]
        trained = there["gradients"] + there["optimizer"] + there["adapters"]
        yield from self._of_the_step(step)
        if job.method.kind == "full":
            rest = there["gradients"] + there["optimizer"]
            yield Change("method=lora", "trains an update of the weights, not the weights", rest)
        elif job.quant.choice in ("none", "int8"):
            share = 0.7 if job.quant.choice == "none" else 0.45
            yield Change("quant=nf4", "the base rounded to 4 bits, made dense in every pass", share * there["weights"])
        if (rank := getattr(job.method.options, "rank", 0)) >= 2:
            yield Change(f"rank={rank // 2}", "an update of half the rank", trained / 2)
        if job.optim.choice in ("adamw", "paged_adamw_32bit"):
            paged = "paged_" if self.device.type == "cuda" else ""
            yield Change(f"optim={paged}adamw_8bit", "moments rounded to 8 bits", 0.7 * there["optimizer"])
        if job.model.options.dtype == "float32":
            yield Change("model.dtype=bfloat16", "weights and products in 8 bits of precision", there["weights"] / 2)
        depth = self.twin.depth
        if getattr(job.method.options, "layers", None) == "all" and depth > 1:
            cost = "the lower half of the layers keeps the base's weights"
            yield Change(f"layers=last:{depth // 2}", cost, (there["activations"] + trained) / 2)

    def _of_the_step(self, step: int) -> Iterator[Change]:
        rows, layers, depth = self.settled.micro_batch, self.settled.recomputed, self.twin.graphs
        if self.settled.kept.where == "memory" and self.device.type == "cpu":
            kept = self.settled.plan.kept_prefix["bytes"]
            yield Change("keep_prefix=disk", "the frozen layers' outputs are read from a file", kept)
        if rows > 1:
            fewer = next(n for n in range(rows // 2, 0, -1) if self.job.batch % n == 0)
            yield Change(f"micro_batch={fewer}", "the same batch in more, smaller passes", step * (1 - fewer / rows))
        if layers < depth:
            cost = "each layer's forward pass is computed twice: up to a third more computing"
            kept = self.settled.plan.at_peak["activations"]
            yield Change("checkpointing=all", cost, 0.9 * kept * (depth - layers) / depth)
        longest = max(self.settled.plan.lengths)
        if longest > 32:
            shorter = longest // 2
            yield Change(f"seq_len={shorter}", f"rows of more than {shorter} tokens are cut", step / 2)
        if self.job.kernels == "reference":
            yield Change("kernels=fast", "nothing: the same maths", step)


def _gentlest(found: Sequence[Saving]) -> str:
    """Of the changes that fit the one that changes the result least; else the greatest saving of those that leave it
    as it is, or of all."""
    fitting = [one for one in found if one.fits]
    if fitting:
        return min(fitting, key=lambda one: (_GENTLE.index(_key(one.override)), -one.saved_bytes)).override
    same = [one for one in found if _GENTLE.index(_key(one.override)) <= _GENTLE.index("checkpointing")]
    return max(same or found, key=lambda one: one.saved_bytes).override


def _key(override: str) -> str:
    return override.partition("=")[0]


def advise(advisor: Advisor) -> str:
    """The nearest settings that fit, in words."""
    found = advisor.nearest()
    if found is None:
        return "No smaller setting of this job fits either; a smaller model does"
    overrides, made = found
    return f"These settings fit, with {made.needed_bytes / 1e9:.2f} GB: {' '.join(overrides)}"
