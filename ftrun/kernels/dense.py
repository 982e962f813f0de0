"""The dense protocol: one way to ask any linear layer for its matrix, its sizes and its experts.

A linear layer is an `nn.Linear` (weight (out, in)), transformers' `Conv1D` (weight (in, out)), or any module
with `.dense()`, `.in_features` and `.out_features`, as the quantised ones have. A layer's experts, once grouped
(ftrun/kernels/experts.py: `group_experts`; quantised ones always are), are such modules too: their `dense()` is
(experts, out, in), they have `.experts`, and are called with `(x sorted by expert, offsets)`.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class Dense(Protocol):
    """A linear layer that makes its matrix on demand, as a quantised one does.

    `dense(dtype)` gives a fresh (out_features, in_features) tensor of `dtype` (None: the compute dtype of the
    base) on the layer's device; it carries no gradient and nothing keeps it alive.
    """

    in_features: int
    out_features: int

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor: ...


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D (GPT-2), told by its shape so that nothing heavy is imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether the dense protocol covers the module."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or isinstance(module, Dense)


def dense_weight(module: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The layer's matrix (out_features, in_features), in its own dtype or in `dtype`.

    A plain layer gives a view of its live parameter (gradients flow); a quantised one a fresh tensor without
    gradient. Raises TypeError for a module that is no linear layer.
    """
    if isinstance(module, Dense):
        return module.dense(dtype)
    weight = _weight(module)
    return weight if dtype is None else weight.to(dtype)


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer. Raises TypeError for a module that is none."""
    if isinstance(module, nn.Linear | Dense):
        return module.in_features, module.out_features
    rows, columns = _weight(module).shape
    return columns, rows


def _weight(module: Any) -> torch.Tensor:
    if is_conv1d(module):
        return module.weight.T
    if isinstance(module, nn.Linear):
        return module.weight
    raise TypeError(f"{type(module).__name__} is no linear layer: it has neither a weight of two sizes nor dense()")
