"""The fastest settings of a job that fit its device: every choice planned, its speed predicted, its loss explained."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftrun import assemble
from ftrun.compose import changed
from ftrun.errors import UserError
from ftrun.job import Job
from ftrun.memory.cost import Cost
from ftrun.memory.device import Device
from ftrun.memory.track import FORWARD
from ftrun.planning.keeping import settle_keeping
from ftrun.planning.settle import Settled, Supply, Worst, row_counts
from ftrun.planning.speed import Speed
from ftrun.planning.twin import CLIPPING, OPTIMISER, Lived, Twin

_CHUNKS = (128, 512, 2048)  # tokens of logits at once
_NEAR = 0.97  # a choice this near to the fastest is called as fast


@dataclass(frozen=True)
class Choice:
    """One setting of everything that may vary: what to type, what it needs, its speed, and why it lost."""

    overrides: tuple[str, ...]
    needed_bytes: int
    fits: bool
    tokens_per_s: float  # predicted
    recomputed: int
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {**dataclasses.asdict(self), "overrides": list(self.overrides)}


class Fit:
    """The search. vary: option -> the values to try ("quant", "rank", "seq_len"); each is an override of the job."""

    def __init__(
        self,
        job: Job,
        supply: Callable[[Job], Worst],
        sketch: Callable[[Job], assemble.Sketch],
        device: Device,
        speed: Speed,
    ) -> None:
        self.job, self.supply, self.sketch, self.device, self.speed = job, supply, sketch, device, speed

    def choices(self, vary: Mapping[str, Sequence[Any]]) -> list[Choice]:
        """Every choice with the reason why it lost, the best first; none of them need fit."""
        found: list[Choice] = []
        for values in itertools.product(*vary.values()):
            overrides = [f"{key}={value}" for key, value in zip(vary, values, strict=True)]
            found += self._of_one_model(overrides)
        return _explained(self.job, found)

    def _of_one_model(self, overrides: list[str]) -> Iterator[Choice]:
        """All numbers of rows at once, each with as few recomputed layers as fit; then other chunks for the best."""
        try:
            job = changed(self.job, overrides)
            parts = self.sketch(job)
        except UserError:
            return  # a quantiser that the method or the model cannot take
        twin = Twin(job, parts, self.device, counts=True)
        found = [self._choice(job, twin, rows, overrides) for rows in row_counts(job)]
        yield from found
        best = max(found, key=_rank)
        for chunk in _CHUNKS if job.kernels == "fast" else ():
            if chunk != job.loss_chunk:
                more = [*overrides, f"loss_chunk={chunk}"]
                other = changed(self.job, more)
                rows = int(_value(best.overrides, "micro_batch"))
                yield self._choice(other, Twin(other, parts, self.device, counts=True), rows, more)

    def _choice(self, job: Job, twin: Twin, rows: int, overrides: list[str]) -> Choice:
        # whatever a method's YAML says: as few recomputed layers as fit
        fixed = dataclasses.replace(job, micro_batch=rows, checkpointing="auto")
        settled = settle_keeping(fixed, twin, self.supply, self.device)
        words = (*overrides, f"micro_batch={rows}", f"checkpointing={settled.recomputed}")
        plan = settled.plan
        return Choice(words, plan.needed_bytes, plan.fits, self._tokens_per_s(job, twin, settled), settled.recomputed)

    def _tokens_per_s(self, job: Job, twin: Twin, settled: Settled) -> float:
        batches = settled.batches
        keeps = settled.kept.keeps
        often = self.supply.epochs(job) if isinstance(self.supply, Supply) else 1.0
        each, end = _costs(twin.step(batches, settled.recomputed, keeps), twin.below if keeps else 0, often)
        passes = job.batch / job.devices / settled.micro_batch
        seconds = passes * self.speed.seconds(each) + self.speed.seconds(end)
        tokens = sum(batch.tokens for batch in batches) / len(batches)
        return passes * tokens / seconds


def _costs(lived: Lived, kept: int, often: float) -> tuple[Cost, Cost]:
    """The work of one micro-batch, in the mean, and that of the step's end.

    kept: layers whose outputs are kept, so that of the `often` times that a row is seen one runs them.
    """
    each, end, parts = Cost(), Cost(), 1
    for segment in lived.segments:
        parts = max(parts, segment.instant.part + 1)
        if segment.instant.name in (CLIPPING, OPTIMISER):
            end = end.plus(segment.cost)
        else:
            once = segment.instant.name == FORWARD and (segment.instant.layer or 0) < kept
            each = each.plus(segment.cost, 1 / often if once else 1.0)
    return Cost().plus(each, 1 / parts), end


def _rank(choice: Choice) -> tuple[bool, float, int, int]:
    """What fits before what does not, then the fastest, then the fewest recomputed layers and bytes."""
    return choice.fits, choice.tokens_per_s, -choice.recomputed, -choice.needed_bytes


def _changes(job: Job, choice: Choice) -> int:
    """How many of the job's own settings a choice gives up, beside rows at once and recomputed layers."""
    own = {"quant": job.quant.choice, "rank": getattr(job.method.options, "rank", None), "seq_len": job.seq_len}
    own |= {"loss_chunk": job.loss_chunk}
    given = dict(text.split("=", 1) for text in choice.overrides)
    return sum(str(value) != given[key] for key, value in own.items() if key in given)


def _value(overrides: Sequence[str], key: str) -> str:
    return next(text.partition("=")[2] for text in overrides if text.partition("=")[0] == key)


def _explained(job: Job, choices: list[Choice]) -> list[Choice]:
    """The best first: of those as fast as the fastest the one that changes the job least, then the smallest."""
    ordered = sorted(choices, key=_rank, reverse=True)
    near = [c for c in ordered if c.fits and c.tokens_per_s >= _NEAR * ordered[0].tokens_per_s] or ordered[:1]
    best = min(near, key=lambda choice: (_changes(job, choice), choice.needed_bytes))
    ordered = [best, *(choice for choice in ordered if choice is not best)]
    return [dataclasses.replace(choice, why=_why(choice, best)) for choice in ordered]


def _why(choice: Choice, best: Choice) -> str:
    if not choice.fits:
        return "does not fit"
    if choice is best:
        return "as fast as any, nearest to the job"
    share = choice.tokens_per_s / best.tokens_per_s
    return "as fast, within 3 %" if share >= _NEAR else f"slower: {share:.0%} of the fastest"
