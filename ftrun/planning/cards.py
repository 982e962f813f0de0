"""What common GPUs make of a job: on which it fits, and what of its optimiser's state could page there."""

from __future__ import annotations

from typing import Any

from ftrun import assemble
from ftrun.groups import choices_of, find_choice, read_choice
from ftrun.job import Job
from ftrun.memory.device import Options, resolve
from ftrun.optim.gather import size_of
from ftrun.optim.paging import PAGED_FROM
from ftrun.planning.plan import plan
from ftrun.planning.settle import Settled
from ftrun.planning.twin import Twin


def cards(job: Job, parts: assemble.Sketch, twin: Twin, settled: Settled) -> list[dict[str, Any]]:
    """Each GPU of conf/device: its name, its memory, and whether the job fits it as it is settled; smallest first."""
    there = twin if twin.device.type == "cuda" else Twin(job, parts, resolve(Options(type="cuda", memory="1GB"), True))
    found = []
    for name in choices_of("device"):
        values, _ = read_choice(find_choice("device", name))
        if values.get("type") != "cuda" or not values.get("memory"):
            continue
        card = resolve(Options(**values), absent=True)
        made = plan(there, card, settled.batches, settled.recomputed, kept=settled.kept)
        found.append({"name": name, "memory_bytes": card.total_bytes, "fits": made.fits})
    return sorted(found, key=lambda card: (card["memory_bytes"], card["name"]))


def paging(job: Job, twin: Twin) -> dict[str, Any] | None:
    """Which of the optimiser's tensors can page at all; None where the optimiser is none that pages.

    `tensors` of `of`, into which `trained_tensors` of the model are gathered; their `bytes` of moments on CUDA, and the
    elements that a tensor needs.
    """
    options = job.optim.options
    if not getattr(options, "paged", False):
        return None
    moments = 2 if hasattr(options, "eps") else 1
    # (parameters, elements, bytes of moments) of each tensor that the optimiser has
    sizes = [
        (len(bucket), size_of(bucket), size_of(bucket) * moments * group.get("bits", options.bits) // 8)
        for group in assemble.optimiser_buckets(job, twin.parts)
        for bucket in group["params"]
    ]
    large = [each for _, elements, each in sizes if elements >= PAGED_FROM]
    return {
        "tensors": len(large),
        "of": len(sizes),
        "trained_tensors": sum(count for count, _, _ in sizes),
        "bytes": sum(large),
        "from_elements": PAGED_FROM,
    }
