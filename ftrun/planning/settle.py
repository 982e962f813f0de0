"""What `auto` comes to: rows at once and layers computed again, from the plan, before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftrun import assemble, stepping
from ftrun.data.load import Corpus
from ftrun.errors import UserError
from ftrun.job import Job
from ftrun.memory.device import Device
from ftrun.planning.plan import Kept, Plan, plan
from ftrun.planning.twin import Twin
from ftrun.runs import read_json, saved_steps
from ftrun.values import Batch

ENOUGH = 2048  # tokens at once beyond which more of them no longer make a device faster
_LOOKED_AT = 20_000  # steps in which the largest micro-batch is looked for
_LONGEST = 64  # beyond them: the steps that hold one of so many longest rows

# rows at once -> the steps that may need the most, each with its micro-batches
Worst = Callable[[int], list[tuple[int, list[Batch]]]]


@dataclass(frozen=True)
class Settled:
    """The job's micro-batch and recomputed layers, the plan for them, and the step that needs the most."""

    micro_batch: int
    recomputed: int
    plan: Plan
    largest_step: int
    batches: list[Batch]  # the micro-batches that were planned: the first two of that step
    kept: Kept = Kept()  # noqa: RUF009 (frozen)
    strategy: str = "ddp"  # how several devices share

    def as_dict(self) -> dict[str, Any]:
        """What another process needs to run the job as it was settled here: JSON-able."""
        made = {k: getattr(self, k) for k in ("micro_batch", "recomputed", "largest_step", "strategy")}
        return {**made, "plan": dataclasses.asdict(self.plan), "kept": dataclasses.asdict(self.kept)}

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Settled:
        """What `as_dict` gave; without the batches."""
        plan = Plan(**{**found["plan"], "lengths": tuple(found["plan"]["lengths"])})
        settled = {**found, "plan": plan, "kept": Kept(**found["kept"]), "batches": []}
        return cls(**settled)


def settle_sharing(job: Job, attempt: Callable[[str], tuple[Twin, Settled]]) -> tuple[Twin, Settled]:
    """How several devices share: as the job says; by itself the base whole on each where that fits, else in parts.

    attempt: strategy -> its twin, and the job settled by it.
    """
    strategies = ("ddp", "fsdp") if job.strategy == "auto" and job.devices > 1 else (job.strategy,)
    for strategy in strategies:
        twin, settled = attempt(strategy if job.devices > 1 else "ddp")
        settled = dataclasses.replace(settled, strategy=twin.strategy or "ddp")
        if settled.plan.fits or (job.optim.options.by_tensor and not twin.parts.tuner.switchable):
            break  # what fits, or weights that train and that the optimiser needs whole
    return twin, settled


def settle(
    job: Job,
    twin: Twin,
    worst: Worst,
    device: Device,
    source: str = "data",
    kept: Kept = Kept(),  # noqa: B008 (frozen)
) -> Settled:
    """Plan the job; where `micro_batch` or `checkpointing` is auto, choose. `plan.fits` says whether anything fits.

    The largest micro-batch that fits without recomputation is taken where it is large enough to keep the device busy;
    else the largest that fits with all layers recomputed, and then as few recomputed layers as fit. Where nothing
    fits, the settings that need least.
    """
    tries: dict[tuple[int, int], Settled] = {}

    def attempt(rows: int, layers: int) -> Settled:
        if (rows, layers) not in tries:
            tries[rows, layers] = planned(twin, worst, device, rows, layers, source, kept)
        return tries[rows, layers]

    return _choose(row_counts(job), layer_counts(job, twin.graphs), attempt)


def as_before(job: Job, out: Path) -> Job:
    """The job with the rows at once and the recomputed layers of the run in `out`, where they are auto.

    What is free differs from hour to hour, and other rows at once give other last bits.
    """
    try:
        found = (read_json(out / "plan.json") or {}) if saved_steps(out / "checkpoints") else {}
        rows, layers = found.get("micro_batch"), found.get("checkpointing")
    except (UserError, AttributeError):
        return job
    same: dict[str, int] = {}
    if job.micro_batch == "auto" and isinstance(rows, int) and rows > 0 and job.batch % (rows * job.devices) == 0:
        same["micro_batch"] = rows
    if job.checkpointing == "auto" and isinstance(layers, int) and layers >= 0:
        same["checkpointing"] = layers
    return dataclasses.replace(job, **same) if same else job  # type: ignore[arg-type]


def planned(
    twin: Twin,
    worst: Worst,
    device: Device,
    rows: int,
    layers: int,
    source: str = "data",
    kept: Kept = Kept(),  # noqa: B008 (frozen)
) -> Settled:
    """The worst step with `rows` rows at once and `layers` recomputed layers."""
    made = [
        Settled(rows, layers, plan(twin, device, batches, layers, source, rows, kept), step, batches, kept)
        for step, batches in worst(rows)
    ]
    return max(made, key=lambda one: one.plan.peak_bytes)


def row_counts(job: Job) -> list[int]:
    """The micro-batches to choose from, largest first."""
    if isinstance(job.micro_batch, int):
        return [job.micro_batch]
    share = job.batch // job.devices
    return [n for n in range(share, 0, -1) if share % n == 0]


def layer_counts(job: Job, graphs: int) -> list[int]:
    """The numbers of recomputed layers to choose from, fewest first. graphs: layers that record a graph."""
    fixed = {"none": [0], "all": [graphs], "auto": [0, graphs]}
    return fixed[job.checkpointing] if isinstance(job.checkpointing, str) else [min(job.checkpointing, graphs)]


def notes(job: Job, twin: Twin) -> list[str]:
    """What the job asks for and cannot have, a warning line each."""
    asked, said = job.checkpointing, []
    if job.offload and twin.device.type == "cpu":
        said.append("warning: offload=true: the device is the host itself: nothing is moved")
    if not isinstance(asked, int) or asked <= twin.graphs:
        return said
    return [
        *said,
        f"warning: checkpointing={asked}: only the {twin.graphs} layers from the lowest trained one on keep anything "
        f"for the backward pass; {twin.graphs} are recomputed",
    ]


def _choose(row_counts: list[int], layer_counts: list[int], attempt: Callable[[int, int], Settled]) -> Settled:
    fewest, most = layer_counts[0], layer_counts[-1]
    if attempt(row_counts[0], fewest).plan.fits:
        return attempt(row_counts[0], fewest)
    least = row_counts[-1]
    if not any(attempt(least, layers).plan.fits for layers in (most, fewest)):
        return attempt(least, most)  # fewer plans than all between them
    busy = next((one for rows in row_counts if (one := attempt(rows, fewest)).plan.fits), None)
    if busy and (fewest == most or sum(busy.plan.lengths) >= ENOUGH):
        return busy
    rows = next(n for n in row_counts if (busy and n <= busy.micro_batch) or attempt(n, most).plan.fits)
    if busy and rows <= busy.micro_batch:
        return busy  # computing layers again makes no room for more
    return _fewest(rows, fewest, most, attempt)


def _fewest(rows: int, low: int, high: int, attempt: Callable[[int, int], Settled]) -> Settled:
    """By halving: the fewest recomputed layers that fit; `high` does, `low` may not."""
    while low < high:
        middle = (low + high) // 2
        if attempt(rows, middle).plan.fits:
            high = middle
        else:
            low = middle + 1
    return attempt(rows, high)


def supply_at_hand(
    job: Job, parts: assemble.Sketch, cache: Path, say: Callable[[str], None]
) -> tuple[Callable[[Job], Worst], str]:
    """(the worst steps, "data"); or rows of `seq_len` tokens and "seq_len" where no tokenizer or no data is at hand."""
    if not parts.base.tokenizer_at_hand:
        say(f"{parts.base.name}: its tokenizer is not at hand; planned for rows of seq_len={job.seq_len} tokens")
        return rows_of_seq_len, "seq_len"
    if getattr(job.data.load(), "REMOTE", False):
        say(f"data={job.data.choice}: not fetched for a plan; planned for rows of seq_len={job.seq_len} tokens")
        return rows_of_seq_len, "seq_len"
    corpus = assemble.rows(job, parts, cache, say)
    tokenizer = parts.base.tokenizer()
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return supply_of(corpus, pad_id, stepping.steps_of(job, corpus)), "data"


@dataclass(frozen=True)
class Supply:
    """The worst step of the data for this job and for others like it: with other kernels, or shorter rows."""

    corpus: Corpus
    pad_id: int
    total: int  # steps of the whole run

    def __call__(self, job: Job) -> Worst:
        worst = worst_of(job, self.corpus, self.pad_id, self.total)

        def shortened(rows: int) -> list[tuple[int, list[Batch]]]:
            return [(step, [stepping.batching.cut(b, job.seq_len) for b in batches]) for step, batches in worst(rows)]

        return shortened if job.seq_len < int(self.corpus.train.lengths.max()) else worst

    @property
    def lengths(self) -> np.ndarray:
        """Each row's tokens."""
        return self.corpus.train.lengths

    def epochs(self, job: Job) -> float:
        """How often a run sees its rows."""
        return self.total / stepping.batching.steps_in(1, len(self.lengths), job.batch)


def supply_of(corpus: Corpus, pad_id: int, total: int) -> Supply:
    """The worst steps of the data at hand."""
    return Supply(corpus, pad_id, total)


def worst_of(job: Job, corpus: Corpus, pad_id: int, total: int) -> Worst:
    """The worst steps of the job's own data: the one whose first micro-batch holds the most tokens, and the one whose
    second does, where that is another.

    Not the run's first, where the optimiser's state is not there yet. Of a step's micro-batches the first two are
    planned: they are the longest, and from the second on the gradients are there.
    """
    lengths, packed = corpus.train.lengths, job.kernels == "fast"

    def worst(rows: int) -> list[tuple[int, list[Batch]]]:
        def sizes(step: int) -> tuple[int, int]:
            parts = [part for part in stepping.micro_rows(job, corpus, rows, step)[:2] if part]
            found = [int(lengths[p].sum() if packed else lengths[p].max() * len(p)) for p in parts]
            return found[0], found[1] if len(found) > 1 else 0

        found = {step: sizes(step) for step in _candidates(job, lengths, total)}
        first = max(found, key=lambda step: found[step])
        second = max(found, key=lambda step: found[step][::-1])
        chosen = [first] if found[second][1] == found[first][1] else [first, second]
        return [(step, _first_two(job, corpus, rows, pad_id, step)) for step in chosen]

    return worst


def _candidates(job: Job, lengths: np.ndarray, total: int) -> list[int]:
    """Steps among which the largest is: all; of a very long run the first, and those of the longest rows."""
    steps = range(min(1, total - 1), total)
    if len(steps) <= _LOOKED_AT:
        return list(steps)
    longest = set(np.argsort(lengths)[-_LONGEST:].tolist())
    batching, by_epoch = stepping.batching, job.steps is None
    late = range(_LOOKED_AT, min(total, _LOOKED_AT + 10 * _LOOKED_AT))
    rows = (batching.step_rows(len(lengths), job.batch, step, job.seed, by_epoch=by_epoch) for step in late)
    return [*steps[:_LOOKED_AT], *(step for step, taken in zip(late, rows, strict=True) if longest & set(taken))]


def _first_two(job: Job, corpus: Corpus, rows: int, pad_id: int, step: int) -> list[Batch]:
    parts = [part for part in stepping.micro_rows(job, corpus, rows, step)[:2] if part]
    return [stepping.batching.collate(corpus.train, p, packed=job.kernels == "fast", pad_id=pad_id) for p in parts]


def rows_of_seq_len(job: Job) -> Worst:
    """The worst step where no data is at hand: every row has `seq_len` tokens, and all of them are learnt."""

    def worst(rows: int) -> list[tuple[int, list[Batch]]]:
        batch = stepping.batching.filled(rows, job.seq_len, packed=job.kernels == "fast")
        return [(0, [batch] * min(2, max(1, job.batch // job.devices // rows)))]

    return worst


def refusal(chosen: Settled, device: Device) -> str:
    """Why nothing fits: what is needed and by what, what there is, and what was planned with."""
    heaviest, size = max(chosen.plan.at_peak.items(), key=lambda item: item[1])
    return (
        f"the job needs {chosen.plan.needed_bytes / 1e9:.2f} GB at its peak, the {chosen.plan.peak_instant} "
        f"({heaviest}: {size / 1e9:.2f} GB); {device.name} has {device.free_bytes / 1e9:.2f} GB free, of which "
        f"{device.usable_bytes / 1e9:.2f} GB can be planned for. "
        f"Planned with micro_batch={chosen.micro_batch}, {chosen.recomputed} layers recomputed"
    )
