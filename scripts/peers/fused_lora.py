"""fms-acceleration's fused LoRA over bitsandbytes layers (unsloth_lora/bnb/fast_lora.py), tensor by tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def _parameters(layer: Any) -> tuple[Any, ...]:
    """(packed base layer, A, B, scale, dropout) of PEFT's LoRA layer."""
    return (
        layer.base_layer,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.scaling["default"],
        layer.lora_dropout["default"],
    )


def _forward(x: torch.Tensor, base: Any, a: torch.Tensor, b: torch.Tensor, s: float, dropout: nn.Module) -> Any:
    """matmul_lora: (output, what its low-rank path read)."""
    dtype = x.dtype
    flat = x.view(-1, x.shape[-1])
    weight = base.dequantised(dtype)
    out = torch.matmul(flat, weight.t())
    del weight
    dropped = dropout(flat)
    out += (dropped @ a.t().to(dtype)) @ (s * b.t().to(dtype))
    return out.view(*x.shape[:-1], -1), dropped


def _low_rank_grads(grad: torch.Tensor, dropped: torch.Tensor, a: torch.Tensor, b: torch.Tensor, s: float) -> Any:
    a, b = a.t(), b.t()
    grad_a = dropped.t() @ (grad @ b.t())
    grad_b = (a.t() @ dropped.t()) @ grad
    grad_a *= s
    grad_b *= s
    return grad_a, grad_b


def _low_rank_input(grad: torch.Tensor, dropped: torch.Tensor, a: torch.Tensor, b: torch.Tensor, s: float) -> Any:
    dtype = dropped.dtype
    return (dropped != 0) * (grad @ b.to(dtype) @ (s * a.to(dtype)))


class QKV(torch.autograd.Function):
    """LoRA_QKV: three projections of one input; the gradient of the input is written over it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layers: Any, *weights: torch.Tensor) -> Any:
        outs, dropped = zip(*(_forward(x, *_parameters(layer)) for layer in layers), strict=True)
        ctx.layers = layers
        ctx.save_for_backward(x, *weights, *dropped)
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, *rest = ctx.saved_tensors
        dropped = rest[6:]
        flat = [g.reshape(-1, g.shape[-1]) for g in grads]
        parts = [_parameters(layer)[:4] for layer in ctx.layers]
        trained = [_low_rank_grads(g, d, *p[1:]) for g, d, p in zip(flat, dropped, parts, strict=True)]
        total = None
        for g, d, (base, a, b, s) in zip(flat, dropped, parts, strict=True):
            weight = base.dequantised(x.dtype)
            if total is None:
                total = torch.matmul(g, weight, out=x.view(-1, x.shape[-1]))
            else:
                total += g @ weight
            del weight
            total += _low_rank_input(g, d, a, b, s)
        return total.view(x.shape), None, *(t.t() for pair in trained for t in pair)


class One(torch.autograd.Function):
    """LoRA_W: the output projection."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any, *weights: torch.Tensor) -> torch.Tensor:
        out, dropped = _forward(x, *_parameters(layer))
        ctx.layer = layer
        ctx.save_for_backward(*weights, x, dropped)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        a, b, x, dropped = ctx.saved_tensors
        base, scale = ctx.layer.base_layer, ctx.layer.scaling["default"]
        flat = grad.reshape(-1, grad.shape[-1])
        grad_a, grad_b = _low_rank_grads(flat, dropped, a, b, scale)
        weight = base.dequantised(x.dtype)
        total = flat @ weight
        del weight
        total += _low_rank_input(flat, dropped, a, b, scale)
        return total.view(x.shape), None, grad_a.t(), grad_b.t()


def patch(model: nn.Module) -> None:
    """Every attention whose four projections carry LoRA over packed weights."""
    for module in model.modules():
        if hasattr(module, "q_proj") and hasattr(module.q_proj, "lora_A"):
            _patch_qkv([module.q_proj, module.k_proj, module.v_proj])
            module.o_proj.forward = (lambda o: lambda x: One.apply(x, o, *_parameters(o)[1:3]))(module.o_proj)


def _patch_qkv(layers: list[Any]) -> None:
    held: dict[int, torch.Tensor] = {}

    def forward(number: int, x: torch.Tensor) -> torch.Tensor:
        if not held:
            weights = [w for layer in layers for w in _parameters(layer)[1:3]]
            held.update(enumerate(QKV.apply(x, layers, *weights)))
        return held.pop(number)

    for number, layer in enumerate(layers):
        layer.forward = (lambda n: lambda x: forward(n, x))(number)
