"""A step of one rank among several, on fake tensors: torch's own FSDP2 over a process group that sends nothing, and the
buckets of DDP, which its C++ makes where no fake tensor can follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from ftrun.memory.track import Tracker
from ftrun.train.parallel import Alone, mesh_of
from ftrun.train.ranks import Ranks


class Buckets(Alone):
    """DDP as a rank's memory sees it: what trains has a place for its gradient from the first step on, in which the
    gradient is copied as soon as it is whole (torch/csrc/distributed/c10d/reducer.cpp, gradient_as_bucket_view)."""

    def __init__(self, trained: Sequence[nn.Parameter], world: int, tracker: Tracker) -> None:
        self.factor = float(world)
        self._tracker = tracker
        self._places: dict[nn.Parameter, torch.Tensor] = {}
        self._hooks: list[Any] = []
        self.trained = trained
        self._last = True  # whether the step's gradients are whole after the pass at hand

    def begin(self) -> None:
        """The buckets, made under the tracker, a piece for each parameter: a layer's are then known for its own."""
        for parameter in self.trained:
            place = torch.zeros_like(parameter, requires_grad=False)
            self._tracker.mark([place], "gradients")
            self._places[parameter] = place
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._take))

    def passing(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Before the last micro-batch gradients stay where they are made (no_sync)."""
        self._last = last
        return contextlib.nullcontext()

    def places(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        found = self._places.get(parameter)  # type: ignore[call-overload]
        return [] if found is None else [found]

    def end(self) -> None:
        """The model as it was."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, parameter: torch.Tensor) -> None:
        place = self._places[parameter]  # type: ignore[index]
        if self._last and parameter.grad is not place:
            with torch.no_grad():
                place.copy_(parameter.grad)  # type: ignore[arg-type]
            parameter.grad = place


@contextlib.contextmanager
def pretended(world: int) -> Iterator[tuple[Ranks, Any]]:
    """Within the block this process is the first of so many that hear nothing of each other, and their mesh."""
    assert not dist.is_initialized(), "a plan is made before the ranks are joined"
    dist.init_process_group("fake", rank=0, world_size=world)
    try:
        ranks = Ranks(0, world)
        yield ranks, mesh_of(ranks)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def offloading(tracker: Tracker) -> Iterator[None]:
    """Within the block shards that wait on the host are copied to the device before they are gathered, and gradients of
    shards to the host: on fake tensors, all of which are the CPU's, FSDP2 would take them as they are."""
    gathered, sharded = FSDPParam.all_gather_inputs, FSDPParam.to_sharded_dtensor

    def inputs(parameter: Any) -> list[torch.Tensor]:
        found = gathered.fget(parameter)  # type: ignore[attr-defined]
        return [tracker.from_host(t) for t in found] if parameter.offload_to_cpu else found

    def gradient(parameter: Any, tensor: torch.Tensor) -> torch.Tensor:
        if parameter.offload_to_cpu:
            tensor = tensor.clone()
            tracker.to_host([tensor])
        return sharded(parameter, tensor)

    FSDPParam.all_gather_inputs = property(inputs)  # type: ignore[assignment, method-assign]
    FSDPParam.to_sharded_dtensor = gradient  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FSDPParam.all_gather_inputs = gathered  # type: ignore[method-assign]
        FSDPParam.to_sharded_dtensor = sharded  # type: ignore[method-assign]


@contextlib.contextmanager
def resizing(told: Callable[[int, int], None]) -> Iterator[None]:
    """Within the block `told(storage's key, bytes)` hears of storages that are resized in place, as FSDP2 lets its
    gathered weights go and takes them back."""
    own = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        made = own(storage, size)
        told(storage._cdata, size)
        return made

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = own  # type: ignore[method-assign]
