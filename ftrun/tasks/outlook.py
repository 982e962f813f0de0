"""What a study wants to know of a job before it starts it: its peak, whether that fits, and how much work it is."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ftrun import assemble, stepping
from ftrun.job import Job
from ftrun.memory.cost import Cost
from ftrun.memory.device import Device
from ftrun.planning.settle import Supply, Worst, refusal, supply_at_hand, supply_of
from ftrun.runs import cache_dir
from ftrun.tasks.shared import Prepared, Shared, prepare

# operations that one of another kind counts for, as common processors and cards come near to: a float32 product's,
# attention's, those of a byte that other operations move
_FLOAT32, _ATTENTION, _BYTE = 8.0, 2.0, 100.0
_SIDE, _ROUNDS = 1024, 5  # of the product that is timed
_TYPICAL = 150.0  # TFLOPS of a card of which nothing is known


def outlook(job: Job, shared: Shared, whole: bool = True) -> dict[str, Any]:
    """JSON-able values; bytes, and `work` in operations of 16-bit products (None: where the data's size is unknown).

    whole: with the base's files and the data, as training has them; else with what is at hand, as `ftrun plan` does.
    Raises UserError where the job cannot be one.
    """
    device, whole_device = shared.device(job), shared.whole_device(job)
    supply: Callable[[Job], Worst]
    if whole:
        parts = shared.sketch(job, cache_dir(), _nothing)
        corpus = shared.rows(job, parts, cache_dir(), _nothing)
        tokenizer = parts.base.tokenizer()
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        total = stepping.steps_of(job, corpus)
        supply = supply_of(corpus, pad_id, total)
        prepared = shared.prepared(job, parts, corpus, device, pad_id, total, Path(str(job.out)))
    else:
        parts = assemble.sketch(job, cache_dir(), _nothing)
        supply, source = supply_at_hand(job, parts, cache_dir(), _nothing)
        prepared = prepare(job, parts, supply, device, source, counts=True)
    plan = prepared.settled.plan
    return {
        "fits": plan.fits,
        "why": None if plan.fits else refusal(prepared.settled, device),
        "needed_bytes": plan.needed_bytes,
        "peak_bytes": plan.peak_bytes,
        "trainable_params": plan.trainable_params,
        "total_params": plan.total_params,
        "micro_batch": prepared.settled.micro_batch,
        "recomputed": prepared.settled.recomputed,
        "base": f"{parts.base.name} {parts.quantiser.scheme()} {job.model.options.dtype}",
        "ranks": job.devices // (job.nnodes or 1) if device.type == "cpu" else 1,  # processes that share the device
        "process_bytes": _resident() - _kept(shared) if device.type == "cpu" else 0,
        "device": {
            "type": device.type,
            "name": device.name,
            "count": torch.cuda.device_count() if device.type == "cuda" and device.present else 1,
            "free_bytes": whole_device.free_bytes,
            "usable_bytes": whole_device.usable_bytes,
            "rate": _rate(job, device),
        },
        **_run(job, prepared, supply),
    }


def _run(job: Job, prepared: Prepared, supply: Any) -> dict[str, Any]:
    """The run's steps, tokens and work, in proportion to the tokens of the step that was planned."""
    lengths = prepared.settled.plan.lengths
    if isinstance(supply, Supply):
        steps, mean = supply.total, float(supply.lengths.mean())
    elif job.steps is not None:
        steps, mean = job.steps, float(job.seq_len)
    else:
        return {"steps": None, "tokens": None, "work": None}
    tokens = steps * job.batch * mean
    cost = prepared.work or Cost()
    counted = sum(b.tokens for b in prepared.settled.batches) or sum(lengths)
    work = cost.products16 + _FLOAT32 * cost.products32 + _ATTENTION * cost.attention + _BYTE * cost.traffic
    return {"steps": steps, "tokens": round(tokens), "work": work / counted * tokens}


def _rate(job: Job, device: Device) -> float:
    """The device's products in operations a second: measured in a moment, or as the maker of an absent one says."""
    if not device.present:
        return 1e12 * float(job.device.options.tflops or _TYPICAL)
    return _measured(device.type, device.bf16)


@functools.cache
def _measured(kind: str, bf16: bool) -> float:
    factor = torch.ones(_SIDE, _SIDE, device=kind, dtype=torch.bfloat16 if bf16 else torch.float32)
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        float((factor @ factor)[0, 0])  # waits for the result
        seconds.append(time.perf_counter() - started)
    return 2 * _SIDE**3 / min(seconds)


def _kept(shared: Shared) -> int:
    return shared.shelf.bytes if shared.shelf is not None else 0


def _resident() -> int:
    """Bytes that this process holds."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _nothing(text: str) -> None:
    """Nobody is there to be told."""
