"""A gated activation, act(gate) · up (Shazeer 2020: SwiGLU, GEGLU), as one operation.

Kept for the backward pass: gate and up, where the plain graph also keeps act(gate).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ftrun.kernels import compiled

ACTS = ("silu", "gelu_tanh")  # in the order in which the compiled kernel counts them


def reference(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    """gate, up (…, I) -> (…, I), in their dtype."""
    return (F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")) * up


def fast(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    """The value of `reference`, with the gradients of gate and up. act: one of ACTS."""
    out: torch.Tensor = _Gated.apply(gate, up, act)
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.act = act
        out: torch.Tensor = torch.ops.ftrun.gated(gate, up, act)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *torch.ops.ftrun.gated_backward(grad.contiguous(), *ctx.saved_tensors, ctx.act), None


def _gated(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    if gate.is_cuda:
        return _on_cuda(gate, up, act)
    out = torch.empty_like(gate)
    compiled.call("gated", *_sizes(gate, act), gate, up, out)
    return out


def _gated_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if gate.is_cuda:
        return _back_on_cuda(grad, gate, up, act)
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    compiled.call("gated_backward", *_sizes(gate, act), grad, gate, up, dgate, dup)
    return dgate, dup


def _sizes(gate: torch.Tensor, act: str) -> tuple[bool, int, int, int, int]:
    width = gate.shape[-1]
    return gate.dtype == torch.bfloat16, ACTS.index(act), gate.numel() // max(1, width), width, width


@compiled.on_cuda
def _on_cuda(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    return reference(gate, up, act)


@compiled.on_cuda
def _back_on_cuda(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: str
) -> tuple[torch.Tensor, torch.Tensor]:
    x, z = gate.float(), grad.float()
    if act == "silu":
        s = torch.sigmoid(x)
        value, slope = x * s, s * (1 + x * (1 - s))
    else:
        s = torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3))
        value, slope = x * s, s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x**2)
    return (z * up * slope).to(gate.dtype), (z * value).to(gate.dtype)


def _register() -> None:
    define, implement, fake = torch.library.define, torch.library.impl, torch.library.register_fake
    define("ftrun::gated", "(Tensor gate, Tensor up, str act) -> Tensor")
    implement("ftrun::gated", "default", _gated)
    fake("ftrun::gated", lambda gate, up, act: torch.empty_like(gate))
    define("ftrun::gated_backward", "(Tensor grad, Tensor gate, Tensor up, str act) -> (Tensor, Tensor)")
    implement("ftrun::gated_backward", "default", _gated_backward)
    fake("ftrun::gated_backward", lambda grad, gate, up, act: (torch.empty_like(gate), torch.empty_like(up)))


_register()
