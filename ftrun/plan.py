"""The plan of a job: its memory by component, at its peak, between steps and through a step. Reads no weight.

The plan is the run: the figures come of the job's own assembly and training step on fake tensors (ftrun/twin.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftrun.memory.device import Device
from ftrun.memory.track import Moment
from ftrun.twin import Lived, Twin
from ftrun.values import Batch


@dataclass(frozen=True)
class Plan:
    """What plan.json holds; all sizes in bytes. See the contract for the fields."""

    total_params: int
    trainable_params: int
    peak_bytes: int
    peak_instant: str  # "backward of layer 31"
    at_peak: dict[str, int]
    steady: dict[str, int]
    timeline: list[dict[str, Any]]  # {"at": name, "bytes": at its highest, "by_role": {…}} in the order of a step
    paged_bytes: int
    adapter_bytes: int  # of what the run hands over, on disk
    micro_batch: int
    checkpointing: int  # decoder layers that are computed again
    lengths: tuple[int, ...]  # the rows of the micro-batch it was made for
    lengths_from: str  # "data", or "seq_len" where no data or tokenizer is at hand
    device: dict[str, Any]
    fits: bool

    @property
    def needed_bytes(self) -> int:
        """What the device itself must hold: paged state can leave it."""
        return self.peak_bytes - self.paged_bytes

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values."""
        return dataclasses.asdict(self)


def plan(
    twin: Twin, device: Device, micro_batches: Sequence[Batch], recomputed: int, lengths_from: str = "data"
) -> Plan:
    """The memory of one step over `micro_batches`, the optimiser's state in place.

    micro_batches: real batches on the CPU, of the largest rows that a step will see.
    recomputed: how many of the first decoder layers are computed again in the backward pass.
    """
    lived = twin.step(micro_batches, recomputed)
    peak, largest = lived.peak, max(micro_batches, key=lambda b: b.input_ids.numel())
    parts = len(micro_batches)
    return Plan(
        total_params=twin.total,
        trainable_params=twin.trained,
        peak_bytes=peak.peak.total,
        peak_instant=peak.instant.words(parts),
        at_peak=dict(peak.peak.by_role),
        steady=dict(lived.steady.by_role),
        timeline=_timeline(lived, parts),
        paged_bytes=lived.paged,
        adapter_bytes=twin.file_bytes,
        micro_batch=len(largest.lengths),
        checkpointing=recomputed,
        lengths=largest.lengths,
        lengths_from=lengths_from,
        device={"name": device.name, "type": device.type, "total_bytes": device.total_bytes},
        fits=peak.peak.total - lived.paged <= device.free_bytes,
    )


def _timeline(lived: Lived, parts: int) -> list[dict[str, Any]]:
    return [{"at": s.instant.words(parts), "bytes": s.peak.total, "by_role": _present(s.peak)} for s in lived.segments]


def _present(moment: Moment) -> dict[str, int]:
    return {role: size for role, size in moment.by_role.items() if size}
