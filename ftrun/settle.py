"""What `auto` comes to: rows at once and layers computed again, from the plan, before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ftrun import assemble
from ftrun.assemble import Sketch
from ftrun.data.load import Corpus
from ftrun.errors import DoesNotFit
from ftrun.job import Job
from ftrun.memory.device import Device
from ftrun.plan import Plan, plan
from ftrun.twin import Twin
from ftrun.values import Batch

ENOUGH = 2048  # tokens at once beyond which more of them no longer make a device faster
SHARE = 0.9  # of the free memory: the rest is for what no plan sees (fragments, other processes)
_LOOKED_AT = 2000  # steps in which the largest micro-batch is looked for


@dataclass(frozen=True)
class Settled:
    """The job's micro-batch and recomputed layers, the plan for them, and the step that needs the most."""

    micro_batch: int
    recomputed: int
    plan: Plan
    largest_step: int


def settle(job: Job, parts: Sketch, corpus: Corpus, device: Device, pad_id: int, total: int) -> Settled:
    """Plan the job; where `micro_batch` or `checkpointing` is auto, choose.

    The largest micro-batch that fits without recomputation is taken where it is large enough to keep the device busy;
    else the largest that fits with all layers recomputed, and then as few recomputed layers as fit.
    Raises DoesNotFit (exit code 3), with the component that weighs most, where nothing fits and refuse=true.
    """
    depth, twin = parts.anatomy.depth, Twin(job, parts, device.type)
    tries: dict[tuple[int, int], Settled] = {}

    def attempt(rows: int, layers: int) -> Settled:
        if (rows, layers) not in tries:
            step, batches = _largest(job, corpus, rows, pad_id, total)
            tries[rows, layers] = Settled(rows, layers, plan(twin, device, batches, layers), step)
        return tries[rows, layers]

    def fits(one: Settled) -> bool:
        return one.plan.needed_bytes <= SHARE * device.free_bytes

    chosen = _choose(_row_counts(job), _layer_counts(job, depth), attempt, fits)
    if not fits(chosen) and job.refuse:
        raise DoesNotFit(_refusal(chosen, device))
    return chosen


def _row_counts(job: Job) -> list[int]:
    """The micro-batches to choose from, largest first."""
    if isinstance(job.micro_batch, int):
        return [job.micro_batch]
    share = job.batch // job.devices
    return [n for n in range(share, 0, -1) if share % n == 0]


def _layer_counts(job: Job, depth: int) -> list[int]:
    """The numbers of recomputed layers to choose from, fewest first."""
    fixed = {"none": [0], "all": [depth], "auto": [0, depth]}
    return fixed[job.checkpointing] if isinstance(job.checkpointing, str) else [min(job.checkpointing, depth)]


def _choose(
    row_counts: list[int],
    layer_counts: list[int],
    attempt: Callable[[int, int], Settled],
    fits: Callable[[Settled], bool],
) -> Settled:
    fewest, most = layer_counts[0], layer_counts[-1]
    busy = None
    for rows in row_counts:
        one = attempt(rows, fewest)
        if fits(one):
            busy = one
            break
    if busy and (fewest == most or busy.micro_batch == row_counts[0] or sum(busy.plan.lengths) >= ENOUGH):
        return busy
    for rows in row_counts:
        if fits(attempt(rows, most)):
            return _fewest(rows, fewest, most, attempt, fits)
    return attempt(row_counts[-1], most)


def _fewest(
    rows: int, low: int, high: int, attempt: Callable[[int, int], Settled], fits: Callable[[Settled], bool]
) -> Settled:
    """By halving: the fewest recomputed layers that fit; `high` does, `low` may not."""
    while low < high:
        middle = (low + high) // 2
        if fits(attempt(rows, middle)):
            high = middle
        else:
            low = middle + 1
    return attempt(rows, high)


def _largest(job: Job, corpus: Corpus, rows: int, pad_id: int, total: int) -> tuple[int, list[Batch]]:
    """The step whose micro-batch holds the most tokens (not the first, where the state is not there yet), and two of
    its micro-batches, the largest twice where the step has several."""
    lengths = corpus.train.lengths
    packed = job.kernels == "fast"
    best, best_step, best_rows, several = -1, 0, [0], False
    for step in range(min(1, total - 1), min(total, _LOOKED_AT)):
        parts = assemble.micro_rows(job, corpus, rows, step)
        for part in parts:
            size = int(lengths[part].sum() if packed else lengths[part].max() * len(part))
            if size > best:
                best, best_step, best_rows, several = size, step, part, len(parts) > 1
    batch = assemble.batching.collate(corpus.train, best_rows, packed=packed, pad_id=pad_id)
    return best_step, [batch, batch] if several else [batch]


def _refusal(chosen: Settled, device: Device) -> str:
    heaviest, size = max(chosen.plan.at_peak.items(), key=lambda item: item[1])
    return (
        f"the job needs {chosen.plan.peak_bytes / 1e9:.2f} GB at its peak ({heaviest}: {size / 1e9:.2f} GB); "
        f"{device.name} has {device.free_bytes / 1e9:.2f} GB free, of which {SHARE:.0%} may be planned for. "
        f"Planned with micro_batch={chosen.micro_batch}, {chosen.recomputed} layers recomputed. "
        "Less memory: a smaller seq_len, quant=nf4, checkpointing=all, micro_batch=1, optim=adamw_8bit; "
        "refuse=false starts it all the same"
    )
