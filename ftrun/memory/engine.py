"""Sums that autograd's engine makes in place on ordinary tensors, and out of place on fake ones.

Where a value was used twice, the engine adds the second gradient to the first. It does so in the first one's memory
if nobody else holds that (InputBuffer's accumulate and can_accumulate_inplace, torch/csrc/autograd/input_buffer.cpp),
but never for a tensor subclass or under a dispatch mode: on fake tensors every such sum is a new tensor. A plan that
took it as it comes would hold two gradients of a tied embedding where the run holds one.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

Holders = tuple[int, int, int]


def repurposed(func: Any, args: Any) -> torch.Tensor | None:
    """The operand in whose memory the engine would have put this sum, on ordinary tensors; mostly None.

    To be asked within `__torch_dispatch__`, with the `args` that it was given: it counts who holds the operand.
    """
    if func is not torch.ops.aten.add.Tensor or torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
        return None
    if not all(isinstance(a, torch.Tensor) for a in args[:2]) or _holders(args) != exclusive():
        return None
    mine, other = args[:2]
    same = mine.dtype == other.dtype and mine.shape == other.shape
    return mine if same and is_non_overlapping_and_dense_or_false(mine) else None


def _holders(args: Any) -> Holders:
    """References to the first operand: to its Python object, to the tensor, to its storage."""
    return (
        sys.getrefcount(args[0]),
        args[0]._use_count(),
        torch._C._storage_Use_Count(args[0].untyped_storage()._cdata),
    )


@functools.cache
def exclusive() -> Holders:
    """What `_holders` says where the engine alone holds the tensor: seen once, on a sum that is known to be one.

    To be called first outside of any dispatch, where autograd still works.
    """
    seen: list[Holders] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() != -1:
                seen.append(_holders(args))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Look(), torch.enable_grad():
        x = torch.ones(2, requires_grad=True) * 1
        (x.sin() * x.cos()).sum().backward()
    return seen[0]
