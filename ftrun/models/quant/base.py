"""What every quantiser is: how a weight is stored, in which tensors and bytes, and the modules that hold them.

A storage (`Storage`) is the scheme: the tensors of one weight and the way to and fro. A quantised layer keeps these
tensors as plain buffers; its product makes the weight dense, multiplies, and lets it go: nothing dense outlives the
call, and backward makes it dense again from the stored tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ftrun.kernels.dense import features, is_conv1d
from ftrun.kernels.experts import GroupedExperts, group_experts, grouped_mm, grouped_product, is_experts, why_not

Shape = tuple[int, ...]
ROUTERS = ("gate", "router", "shared_expert_gate")  # linear layers that choose experts; they stay as they are


class Storage:
    """One scheme. `main` names the tensors that hold the weight itself; the others are its constants."""

    main: ClassVar[tuple[str, ...]] = ("packed",)

    @property
    def scheme(self) -> str:
        """The scheme in words, the same for the same stored tensors: a key of caches and adapters' provenance."""
        raise NotImplementedError

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        """The stored tensors of a weight of `shape`: name -> (shape, dtype)."""
        raise NotImplementedError

    def quantise(self, weight: torch.Tensor, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """The stored tensors, on `device` (None: the weight's own)."""
        raise NotImplementedError

    def dequantise(self, stored: Sequence[torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight, fresh, from the stored tensors in the order of `layout`."""
        raise NotImplementedError

    def bytes_for(self, *shape: int) -> dict[str, int]:
        """Bytes that a weight of `shape` takes: `weights` and `quant_constants`. Exactly those of the tensors."""
        found = {"weights": 0, "quant_constants": 0}
        for name, (size, dtype) in self.layout(shape).items():
            found["weights" if name in self.main else "quant_constants"] += math.prod(size) * dtype.itemsize
        return found


class Stored(nn.Module):
    """A weight of `shape` as its storage keeps it, in buffers. `weight_dtype` is what it was made from."""

    def __init__(self, storage: Storage, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.storage, self.shape, self.weight_dtype = storage, shape, dtype
        self.names = tuple(storage.layout(shape))
        for name, (size, kind) in storage.layout(shape).items():
            self.register_buffer(name, torch.empty(size, dtype=kind, device=device))
        # transformers draws random values for modules that it does not know to be filled
        self._is_hf_initialized = True

    def stored(self) -> list[torch.Tensor]:
        """The stored tensors in the order of the layout."""
        return [getattr(self, name) for name in self.names]

    def parts(self) -> dict[str, list[torch.Tensor]]:
        """The stored tensors by their role in a plan: `weights`, `quant_constants`."""
        found: dict[str, list[torch.Tensor]] = {"weights": [], "quant_constants": []}
        for name in self.names:
            found["weights" if name in self.storage.main else "quant_constants"].append(getattr(self, name))
        return found

    def fill(self, weight: torch.Tensor, device: torch.device | str | None = None) -> None:
        """Quantises a dense weight of `shape` into the buffers."""
        assert tuple(weight.shape) == self.shape, f"{tuple(weight.shape)} into {self.shape}"
        self.adopt(self.storage.quantise(weight, device))

    def adopt(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes stored tensors as they are; their shapes and dtypes are the layout's."""
        for name, (size, dtype) in self.storage.layout(self.shape).items():
            found = tensors[name]
            assert tuple(found.shape) == size, f"{name}: {tuple(found.shape)}, expected {size}"
            assert found.dtype == dtype, f"{name}: {found.dtype}, expected {dtype}"
            self._buffers[name] = found

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight of `shape` in `dtype` (None: `weight_dtype`), a fresh tensor without gradient."""
        with torch.no_grad():
            return self.storage.dequantise(self.stored(), self.shape, dtype or self.weight_dtype)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, {self.storage.scheme}, from {str(self.weight_dtype).removeprefix('torch.')}"


class QuantisedLinear(Stored):
    """A linear layer over a stored weight (out, in), with the plain bias of the layer that it stands for."""

    def __init__(
        self, storage: Storage, shape: Shape, bias: nn.Parameter | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(storage, shape, dtype, device)
        self.out_features, self.in_features = shape
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) -> (…, out) in x's dtype; the weight is made dense in that dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Product.apply(x, bias, self.storage, self.shape, *self.stored())


class QuantisedExperts(Stored):
    """The 3-D weight (experts, out, in) of a layer of experts: all of it is made dense for one product."""

    def __init__(self, storage: Storage, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(storage, shape, dtype, device)
        self.experts, self.out_features, self.in_features = shape

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """x (tokens, in) sorted by expert, offsets int32 (experts,) -> (tokens, out) in x's dtype."""
        return _GroupedProduct.apply(x, offsets, self.storage, self.shape, *self.stored())


class Quantiser:
    """A choice of `quant`: which layers it covers and how it stores them. Subclasses say `storage`."""

    kind: ClassVar[str]
    storage: Storage

    def __init__(self, options: Any) -> None:
        self.options = options

    def covers(self, name: str, module: nn.Module) -> bool:
        """Whether the module's weight is stored quantised. The caller leaves embeddings and the head out."""
        if any(name == s or name.endswith("." + s) for s in self.options.skip) or name.split(".")[-1] in ROUTERS:
            return False
        return isinstance(module, nn.Linear) or is_conv1d(module) or is_experts(module)

    def bytes_for(self, *shape: int) -> dict[str, int]:
        """`weights` and `quant_constants` in bytes of a weight (out, in) or (experts, out, in)."""
        return self.storage.bytes_for(*shape)

    def scheme(self) -> str:
        """What decides the stored bytes: a key of caches and of an adapter's provenance."""
        return ",".join([self.storage.scheme, *sorted(f"not {s}" for s in self.options.skip)])

    def empty(self, layer: nn.Module) -> QuantisedLinear:
        """A layer like `layer` (nn.Linear, Conv1D), its buffers unfilled, on its device: meta, fake or real."""
        inputs, outputs = features(layer)
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        bias = getattr(layer, "bias", None)
        return QuantisedLinear(self.storage, (outputs, inputs), bias, weight.dtype, weight.device)

    def group(self, module: nn.Module) -> nn.Module:
        """Makes a module of experts one of quantised experts, in place, unfilled. ValueError where it cannot be."""
        if isinstance(module, GroupedExperts):
            raise ValueError("they are grouped already")
        reason = why_not(module)
        if reason:
            raise ValueError(reason)
        module._is_hf_initialized = True  # type: ignore[assignment]
        return group_experts(module, lambda name, p: QuantisedExperts(self.storage, tuple(p.shape), p.dtype, p.device))


class _Product(torch.autograd.Function):
    """x W^T + b over a stored W. Saves the stored tensors alone, which the layer holds anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, storage: Storage, shape: Shape, *stored: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*stored)
        ctx.storage, ctx.shape = storage, shape
        return F.linear(x, storage.dequantise(stored, shape, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for_x, for_bias, *rest = ctx.needs_input_grad
        bias = grad.reshape(-1, grad.shape[-1]).sum(0) if for_bias else None
        x = grad @ ctx.storage.dequantise(ctx.saved_tensors, ctx.shape, grad.dtype) if for_x else None
        return (x, bias, *(None for _ in rest))


class _GroupedProduct(torch.autograd.Function):
    """x W_e^T for rows sorted by expert e, over a stored W (experts, out, in)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, offsets: torch.Tensor, storage: Storage, shape: Shape, *stored: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(offsets, *stored)
        ctx.storage, ctx.shape = storage, shape
        return grouped_product(x, storage.dequantise(stored, shape, x.dtype), offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        offsets, *stored = ctx.saved_tensors
        x = grouped_mm(grad, ctx.storage.dequantise(stored, ctx.shape, grad.dtype), offsets)
        return (x, *(None for _ in ctx.needs_input_grad[1:]))
