"""The dense protocol: one way to ask any linear layer for its matrix, its sizes and its experts.

A linear layer is an `nn.Linear` (weight (out, in)), transformers' `Conv1D` (weight (in, out)), or any module
with `.dense()`, `.in_features` and `.out_features`, as the quantised ones have. Experts are one module that holds
two or more 3-D parameters (experts, rows, columns), or, quantised, a module with `.dense_expert(name)`.
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


@runtime_checkable
class Experts(Protocol):
    """A quantised layer of experts: `names` are its 3-D parameters ("gate_up_proj", "down_proj").

    `shape_of(name)` is (experts, rows, columns) as transformers stores it; `dense_expert(name, dtype)` a fresh
    tensor of that shape, without gradient.
    """

    names: tuple[str, ...]

    def shape_of(self, name: str) -> tuple[int, int, int]: ...

    def dense_expert(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor: ...


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


def dense_expert(module: nn.Module, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The 3-D matrix `name` (experts, rows, columns) of a layer of experts, plain or quantised."""
    if isinstance(module, Experts):
        return module.dense_expert(name, dtype)
    weight = getattr(module, name)
    return weight if dtype is None else weight.to(dtype)


def _weight(module: Any) -> torch.Tensor:
    if is_conv1d(module):
        return module.weight.T
    if isinstance(module, nn.Linear):
        return module.weight
    raise TypeError(f"{type(module).__name__} is no linear layer: it has neither a weight of two sizes nor dense()")
