"""The plan of a job: its memory by component, at its peak, between steps and through a step. Reads no weight.

The plan is the run: the figures come of the job's own assembly and training step on fake tensors (twin.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftrun import assemble
from ftrun.memory.device import Device
from ftrun.memory.track import Moment
from ftrun.methods.base import FILE_PREFIX
from ftrun.models.select import spans
from ftrun.planning.twin import Lived, Twin
from ftrun.values import Batch


@dataclass(frozen=True)
class Kept:
    """What is kept of the layers below all that trains, from one epoch to the next: where, of how many rows and tokens.

    where: "memory" (the host's), "disk" or "none". tokens: those of the rows that are seen again. why: in words.
    """

    where: str = "none"
    rows: int = 0
    tokens: int = 0
    why: str = "the job has no rows that are seen again above layers that stay as they are"

    @property
    def keeps(self) -> bool:
        """Whether anything is kept."""
        return self.where != "none"


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
    without_graph: int  # decoder layers below all that trains: they record nothing
    lengths: tuple[int, ...]  # the rows of the micro-batch it was made for
    lengths_from: str  # "data", or "seq_len" where no data or tokenizer is at hand
    kept_prefix: dict[str, Any]  # Kept, with its bytes: a part of "other" where they lie in the memory planned for
    on_top: dict[str, int]  # what no tensor holds: words -> bytes; not in peak_bytes
    device: dict[str, Any]
    fits: bool
    # a checkpoint's copy on the host while it is written; on a CPU made only where it fits beside the peak, and in no
    # other figure
    checkpoint_copy_bytes: int = 0
    host_bytes: int = (
        0  # of weights that wait in the host's memory (offload), gradients and state of them; not in the peak
    )

    @property
    def needed_bytes(self) -> int:
        """What the device itself must hold: paged state can leave it."""
        return self.peak_bytes - self.paged_bytes

    @property
    def copies(self) -> bool:
        """On a CPU: whether a checkpoint's copy fits beside the peak."""
        return bool(self.needed_bytes + self.checkpoint_copy_bytes <= self.device["usable_bytes"])

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values."""
        return {**dataclasses.asdict(self), "needed_bytes": self.needed_bytes}


def plan(
    twin: Twin,
    device: Device,
    micro_batches: Sequence[Batch],
    recomputed: int,
    lengths_from: str = "data",
    rows: int | None = None,
    kept: Kept = Kept(),
) -> Plan:
    """The memory of one step over `micro_batches`, the optimiser's state in place.

    micro_batches: real batches on the CPU, of the largest rows that a step will see.
    recomputed: how many decoder layers are computed again in the backward pass, from the lowest trained one on.
    rows: the job's micro-batch, where these batches may hold fewer. kept: what is kept of the frozen layers.
    """
    lived = twin.step(micro_batches, recomputed, kept.keeps)
    kept_bytes = kept.tokens * twin.output_bytes if kept.keeps else 0
    lived = lived.beside(kept_bytes if kept.where == "memory" and device.type == "cpu" else 0)
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
        micro_batch=rows or len(largest.lengths),
        checkpointing=recomputed,
        without_graph=twin.below,
        lengths=largest.lengths,
        lengths_from=lengths_from,
        kept_prefix={**dataclasses.asdict(kept), "bytes": kept_bytes},
        on_top={"CUDA's context": device.context_bytes} if device.type == "cuda" else {},
        device={**dataclasses.asdict(device), "usable_bytes": device.usable_bytes},
        fits=peak.peak.total - lived.paged <= device.usable_bytes,
        host_bytes=lived.host,
        checkpoint_copy_bytes=twin.file_bytes + lived.steady.by_role["optimizer"],
    )


def _timeline(lived: Lived, parts: int) -> list[dict[str, Any]]:
    return [{"at": s.instant.words(parts), "bytes": s.peak.total, "by_role": _present(s.peak)} for s in lived.segments]


def _present(moment: Moment) -> dict[str, int]:
    return {role: size for role, size in moment.by_role.items() if size}


def trained_modules(twin: Twin) -> list[dict[str, Any]]:
    """What trains, equal layers as one: layers ("0-29"), module, tensors (name -> shape), rank, how many weights."""
    tuner, model = twin.parts.tuner, twin.parts.model
    found: dict[Any, dict[str, Any]] = {}
    for wrapper, tensors in _by_module(tuner.named(model)):
        layer, place = split_layer(wrapper, assemble.stack_name(twin.parts))
        shapes = {name: list(t.parameter.shape) for name, t in tensors.items()}
        ranks = [t.parameter.shape[0] for t in tensors.values() if t.group == "A"]
        key = (place, tuple((n, tuple(s)) for n, s in shapes.items()))
        row = found.setdefault(key, {"at": [], "module": place, "tensors": shapes, "rank": max(ranks, default=None)})
        row["at"].append(layer)
    return [_row(row) for row in found.values()]


def _row(row: dict[str, Any]) -> dict[str, Any]:
    at, each = row.pop("at"), sum(math.prod(shape) for shape in row["tensors"].values())
    layers = [layer for layer in at if layer is not None]
    return {"layers": spans(layers) if layers else "-", **row, "count": len(at), "parameters": each * len(at)}


def _by_module(named: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(module, its trained tensors by their last names), in the order of the model."""
    found: dict[str, dict[str, Any]] = {}
    for name, trained in named.items():
        parts = name.removeprefix(FILE_PREFIX).split(".")
        # PEFT's names end in the matrix and "weight": a matrix belongs to the module before it
        size = 2 if len(parts) > 2 and parts[-2].startswith(("lora_", "adapter_")) else 1
        found.setdefault(".".join(parts[:-size]), {})[".".join(parts[-size:])] = trained
    yield from found.items()


def split_layer(module: str, stack: str) -> tuple[int | None, str]:
    """(the decoder layer that a module lies in, its name there); None and the dotted name outside the layers."""
    rest = module.removeprefix(f"{stack}.")
    number, _, place = rest.partition(".")
    return (int(number), place) if rest != module and number.isdigit() else (None, module)
