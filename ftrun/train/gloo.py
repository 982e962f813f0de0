"""FSDP2's two collectives over gloo, with what they take in hand.

Each of gloo's threads keeps the tensors of its last collective until it is given another (seen: a step's peak differed
by several layers from run to run). Here a gathered layer's buffer is emptied once the next is asked for, and what was
summed as soon as it was: what a thread keeps is then an empty shell, and a peak is the same each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter


class Gather(AllGather):
    """Gathers into a buffer that lives until the next one is asked for: by then it has been copied out."""

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if self._last is not None:
            self._last.untyped_storage().resize_(0)
        self._last = torch.empty(*size, dtype=dtype, device=device)
        return self._last

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> None:
        dist.all_gather_into_tensor(output_tensor, input_tensor, group=group)


class Scatter(ReduceScatter):
    """Sums in place and takes this rank's part, as gloo itself does with a copy."""

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        dist.all_reduce(input_tensor, op, group=group)
        output_tensor.copy_(input_tensor.view(dist.get_world_size(group), -1)[dist.get_rank(group)])
        input_tensor.untyped_storage().resize_(0)
