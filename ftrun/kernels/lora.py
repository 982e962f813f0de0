"""LoRA's product beside a frozen linear layer (Hu et al. 2021, eq. 3): y = x Wᵀ + bias + s (drop(x) Aᵀ) Bᵀ.

`reference` is plain autograd. `fast` is one autograd node for base and update: it keeps the input once (where the
plain graph keeps it for the base and again, after dropout, for A), and asks for the frozen weight anew in the
backward pass, so that a dequantised weight never outlives the product that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def reference(
    x: torch.Tensor,
    base: Callable[[torch.Tensor], torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """base(x) + scale · drop(x) Aᵀ Bᵀ, in the dtype of x.

    x (…, in); a (rank, in) and b (out, rank) of any float dtype, cast to that of x; dropout: the share of the
    input that the update does not see.
    """
    update = F.linear(F.linear(F.dropout(x, dropout), a.to(x.dtype)), b.to(x.dtype))
    return base(x) + scale * update


def fast(
    x: torch.Tensor,
    weight: Callable[[], torch.Tensor],
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """The value of `reference` for base(x) = x · weight()ᵀ + bias, with the gradients of x, a and b.

    weight: makes the frozen (out, in) matrix in the dtype of x; called once forward, once backward where x needs a
    gradient. Gradients of a and b have their own dtype (float32), whatever x is.
    """
    return _LoRA.apply(x, a, b, weight, bias, scale, dropout)


class _LoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        weight: Callable[[], torch.Tensor],
        bias: torch.Tensor | None,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        keep = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
        hidden = _drop(rows, keep, dropout) @ a.to(x.dtype).T
        bias = None if bias is None else bias.to(x.dtype)
        out = F.linear(rows, weight(), bias).addmm_(hidden, b.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(rows, a, b, hidden, keep)
        ctx.weight, ctx.scale, ctx.dropout, ctx.shape = weight, scale, dropout, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, a, b, hidden, keep = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        narrow = (grad @ b.to(grad.dtype)).mul_(ctx.scale)
        grad_b = (grad.T @ hidden).to(b.dtype).mul_(ctx.scale) if ctx.needs_input_grad[2] else None
        grad_a = (narrow.T @ _drop(rows, keep, ctx.dropout)).to(a.dtype) if ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            if keep is None:
                grad_x = (grad @ ctx.weight()).addmm_(narrow, a.to(grad.dtype))
            else:
                grad_x = (grad @ ctx.weight()).add_(_drop(narrow @ a.to(grad.dtype), keep, ctx.dropout))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_a, grad_b, None, None, None, None


def _drop(x: torch.Tensor, keep: torch.Tensor | None, dropout: float) -> torch.Tensor:
    return x if keep is None else x * keep / (1 - dropout)
