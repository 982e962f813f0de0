"""What common GPUs make of a job: on which it fits, and what of its optimiser's state could page there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ftrun import assemble
from ftrun.groups import choices_of, find_choice, read_choice
from ftrun.job import Job
from ftrun.memory.device import Options, resolve
from ftrun.optim.paging import PAGED_FROM
from ftrun.planning.plan import plan, trained_modules
from ftrun.planning.settle import Settled
from ftrun.planning.twin import Twin
from ftrun.values import Batch


def cards(
    job: Job, parts: assemble.Sketch, twin: Twin, batches: Sequence[Batch], settled: Settled
) -> list[dict[str, Any]]:
    """Each GPU of conf/device: its name, its memory, and whether the job fits it as it is settled; smallest first."""
    there = twin if twin.device.type == "cuda" else Twin(job, parts, resolve(Options(type="cuda", memory="1GB"), True))
    found = []
    for name in choices_of("device"):
        values, _ = read_choice(find_choice("device", name))
        if values.get("type") != "cuda" or not values.get("memory"):
            continue
        card = resolve(Options(**values), absent=True)
        made = plan(there, card, batches, settled.recomputed)
        found.append({"name": name, "memory_bytes": card.total_bytes, "fits": made.fits})
    return sorted(found, key=lambda card: (card["memory_bytes"], card["name"]))


def paging(job: Job, twin: Twin) -> dict[str, Any] | None:
    """Which of the optimiser's tensors can page at all; None where the optimiser is none that pages.

    `tensors` of `of`, their `bytes` of moments on CUDA, and the elements that a tensor needs.
    """
    if not getattr(job.optim.options, "paged", False):
        return None
    sizes = [(math.prod(shape), row["count"]) for row in trained_modules(twin) for shape in row["tensors"].values()]
    moments = 2 if hasattr(job.optim.options, "eps") else 1
    each = moments * job.optim.options.bits // 8
    large = [(size, count) for size, count in sizes if size >= PAGED_FROM]
    return {
        "tensors": sum(count for _, count in large),
        "of": sum(count for _, count in sizes),
        "bytes": sum(size * count * each for size, count in large),
        "from_elements": PAGED_FROM,
    }
