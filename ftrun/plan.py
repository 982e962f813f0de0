"""The plan is the run: the job's own assembly and training steps on fake tensors, every storage followed by role."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ftrun import assemble
from ftrun.job import Job
from ftrun.memory import cpu_kernels
from ftrun.memory.device import Device
from ftrun.memory.track import Moment, Tracker
from ftrun.models.forward import TokenLoss
from ftrun.models.load import prepare
from ftrun.train.loop import Work, gradients, update
from ftrun.values import Batch

CUDA_BLOCK = 512  # bytes: PyTorch's caching allocator rounds every block up to this


@dataclass(frozen=True)
class Plan:
    """What plan.json holds; all sizes in bytes. See the contract for the fields."""

    total_params: int
    trainable_params: int
    peak_bytes: int
    at_peak: dict[str, int]
    steady: dict[str, int]
    micro_batch: int
    checkpointing: int  # decoder layers that are computed again
    lengths: tuple[int, ...]  # the rows of the micro-batch it was made for
    device: dict[str, Any]
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values."""
        return dataclasses.asdict(self)


def plan(job: Job, parts: assemble.Sketch, device: Device, micro_batches: Sequence[Batch], recomputed: int) -> Plan:
    """The memory of one step over `micro_batches`, the optimiser's state in place. Reads and allocates nothing.

    micro_batches: real batches on the CPU, of the largest rows that the step will see.
    """
    model = copy.deepcopy(parts.model)
    prepare(model, parts.quantiser, parts.base)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        twin = _twin(job, parts, model, recomputed)
        is_cuda = device.type == "cuda"
        tracker = Tracker(CUDA_BLOCK if is_cuda else 1, None if is_cuda else cpu_kernels.transient)
        twin.model.train()  # as the loop does: dropout draws masks
        loss = _Watched(twin.model, job.kernels, tracker)
        work = assemble.work(job, twin, torch.device("cpu"), total=2, loss=loss)
        fakes = [batch.each(mode.from_tensor) for batch in micro_batches]
        with tracker:
            _mark(tracker, twin.model, twin.tuner)
            _make_state(work)
            tracker.mark(_optimiser_state(work.optimiser), "optimizer")
            tracker.reset_peak()
            gradients(work, fakes)
            update(work)
        return _summary(twin, tracker, device, micro_batches, recomputed)


class _Watched(TokenLoss):
    """Books what the loss holds as logits."""

    def __init__(self, model: Any, kernels: str, tracker: Tracker) -> None:
        super().__init__(model, kernels)
        self.tracker = tracker

    def score(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        with self.tracker.role("logits"):
            return super().score(hidden, batch)


def _twin(job: Job, parts: assemble.Sketch, model: Any, recomputed: int) -> assemble.Sketch:
    """The sketch once more, on fake tensors, with its method attached."""
    _to_fake(model)
    twin = dataclasses.replace(parts, model=model, tuner=type(parts.tuner)(parts.tuner.options))
    assemble.attach(job, twin, recomputed)
    return twin


def _to_fake(model: nn.Module) -> None:
    """Meta tensors become fake CPU tensors; a tied weight stays one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None:
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad)
                module._parameters[name] = made[id(old)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _mark(tracker: Tracker, model: nn.Module, tuner: Any) -> None:
    """Book the residents, and have each gradient booked as it is made."""
    trained = "adapters" if tuner.switchable else "weights"
    for module in model.modules():
        plain = {"weights": [b for b in module._buffers.values() if b is not None]}
        stored: dict[str, list[torch.Tensor]] = module.parts() if hasattr(module, "parts") else plain  # type: ignore[operator]
        for role, tensors in stored.items():
            tracker.mark(tensors, role)
    for parameter in model.parameters():
        tracker.mark([parameter], trained if parameter.requires_grad else "weights")
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.mark([p.grad], "gradients"))


def _make_state(work: Work) -> None:
    """The optimiser's state as after a first step, without the step: gradients of nothing are enough to make it."""
    for group in work.optimiser.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    update(work)


def _optimiser_state(optimiser: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [v for state in optimiser.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


def _summary(
    twin: assemble.Sketch, tracker: Tracker, device: Device, micro_batches: Sequence[Batch], recomputed: int
) -> Plan:
    peak: Moment = tracker.peak
    total, trained = assemble.counts(twin)
    largest = max(micro_batches, key=lambda b: b.input_ids.numel())
    return Plan(
        total_params=total,
        trainable_params=trained,
        peak_bytes=peak.total,
        at_peak=dict(peak.by_role),
        steady=dict(tracker.now.by_role),
        micro_batch=len(largest.lengths),
        checkpointing=recomputed,
        lengths=largest.lengths,
        device={"name": device.name, "type": device.type, "total_bytes": device.total_bytes},
        fits=peak.total <= device.free_bytes,
    )
