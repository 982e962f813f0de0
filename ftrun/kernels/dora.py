"""DoRA beside a frozen linear layer (Liu et al. 2024, eq. 5): y = g ⊙ (x Wᵀ + s x Aᵀ Bᵀ) + bias, g = m / ‖W + s B A‖.

The norm runs over the input of each output unit and is a constant in the backward pass (the paper's section 4.3).
Written as x Wᵀ + bias + (g − 1) ⊙ …, a gain near 1 is not rounded to bfloat16 itself, and g = 1 is the base exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ftrun.kernels import compiled
from ftrun.kernels.lora import Factors

_PIECE = 1 << 22  # elements of W that are float32 at once


def squares(weight: torch.Tensor) -> torch.Tensor:
    """‖W‖² of each row of (out, in): (out,) float32, in pieces of rows, without a float32 copy of W."""
    return torch.cat([rows.float().square().sum(1) for rows in _pieces(weight)])


def cross(weight: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """W Aᵀ: (out, rank) float32 from float32 sums, in pieces of rows.

    A bfloat16 W on AMX tiles meets A as the sum of two bfloat16 ones: 16 bits of A, all of W, float32 sums.
    """
    if _tiled(weight):
        found: torch.Tensor = torch.ops.ftrun.cross(weight.contiguous(), a.float().contiguous())
        return found
    turned = a.float().T
    return torch.cat([rows.float() @ turned for rows in _pieces(weight)])


def factored_norm(
    square: torch.Tensor, crossed: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """‖W + s B A‖ of each row, (out,) float32, from ‖W‖² and W Aᵀ: no (out, in) matrix is made.

    ‖W + s B A‖² = ‖W‖² + 2 s ⟨W Aᵀ, B⟩ + s² ⟨B (A Aᵀ), B⟩, row by row.
    """
    a, b = a.float(), b.float()
    within = (b @ (a @ a.T)).mul_(b).sum(1)
    across = (crossed * b).sum(1)
    # rounding may take a norm of nothing below zero
    return (square + 2 * scale * across + scale**2 * within).clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def plain_norm(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """‖W + s B A‖ as it is written, by an (out, in) matrix: the referee of `factored_norm`."""
    return squares(weight.float() + scale * (b.float() @ a.float())).sqrt()


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    magnitude: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """DoRA in plain autograd, in the dtype of x. x (…, in); weight (out, in); magnitude (out,).

    Dropout acts, as in PEFT, on the input of all that differs from the base: y = base(x) + (g − 1) drop(x) Wᵀ + ….
    """
    gain = magnitude.float() / plain_norm(weight, a.detach(), b.detach(), scale)
    seen = F.dropout(x, dropout)
    update = F.linear(F.linear(seen, a.to(x.dtype)), (gain[:, None] * scale * b).to(x.dtype))
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight, bias) + (gain - 1).to(x.dtype) * F.linear(seen, weight) + update


def factors(
    weight: Callable[[torch.dtype], torch.Tensor],
    bias: torch.Tensor | None,
    square: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    magnitude: torch.Tensor,
    scale: float,
) -> Factors:
    """The layer for a product that several share (ftrun/kernels/lora.py: `fast`), with the factored norm.

    weight: makes the frozen (out, in) matrix in a dtype. square: ‖W‖², (out,) float32. Kept for the backward pass:
    x, x Aᵀ and what comes out (before its bias), which whoever reads it mostly keeps as well.
    """

    def gain(matrix: torch.Tensor) -> torch.Tensor:
        return magnitude.detach().float() / factored_norm(
            square, cross(matrix, a.detach()), a.detach(), b.detach(), scale
        )

    return Factors(weight, bias, a, b, scale, gain, magnitude)


def dropping(
    x: torch.Tensor,
    weight: Callable[[], torch.Tensor],
    bias: torch.Tensor | None,
    square: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    magnitude: torch.Tensor,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """The value and gradients of `reference` under dropout, as one autograd node with the factored norm.

    Kept for the backward pass: x, drop(x) Wᵀ and drop(x) Aᵀ.
    """
    return _DoRA.apply(x, a, b, magnitude, weight, bias, square, scale, dropout)


class _DoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        magnitude: torch.Tensor,
        weight: Callable[[], torch.Tensor],
        bias: torch.Tensor | None,
        square: torch.Tensor,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        rows, matrix = x.reshape(-1, x.shape[-1]), weight()
        norm = factored_norm(square, cross(matrix, a), a, b, scale)
        gain = magnitude.float() / norm
        keep = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - dropout)
        seen = _drop(rows, keep, dropout)
        hidden, plain = seen @ a.to(x.dtype).T, seen @ matrix.T
        out = F.linear(rows, matrix, None if bias is None else bias.to(x.dtype))
        out.addcmul_(plain, (gain - 1).to(x.dtype)).addmm_(hidden, _turned(gain, b, scale, x.dtype).T)
        ctx.save_for_backward(rows, a, b, magnitude, gain, norm, hidden, plain, keep)
        ctx.weight, ctx.scale, ctx.dropout, ctx.shape = weight, scale, dropout, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, a, b, magnitude, gain, norm, hidden, plain, keep = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        narrow = grad @ _turned(gain, b, ctx.scale, grad.dtype)
        raw = (grad.T @ hidden).float().mul_(ctx.scale)
        needs_x, needs_a, needs_b, needs_m = ctx.needs_input_grad[:4]
        grad_b = (raw * gain[:, None]).to(b.dtype) if needs_b else None
        grad_a = (narrow.T @ _drop(rows, keep, ctx.dropout)).to(a.dtype) if needs_a else None
        grad_m = None
        if needs_m:
            each = torch.linalg.vecdot(grad.T, plain.T).float() + (raw * b).sum(1)
            grad_m = (each / norm).to(magnitude.dtype)
        grad_x = _to_input(ctx, grad, gain, narrow, a, keep) if needs_x else None
        return grad_x, grad_a, grad_b, grad_m, None, None, None, None, None


def _to_input(
    ctx: Any,
    grad: torch.Tensor,
    gain: torch.Tensor,
    narrow: torch.Tensor,
    a: torch.Tensor,
    keep: torch.Tensor,
) -> torch.Tensor:
    matrix, surplus = ctx.weight(), (gain - 1).to(grad.dtype)
    seen = (grad * surplus @ matrix).addmm_(narrow, a.to(grad.dtype))
    return (grad @ matrix).add_(_drop(seen, keep, ctx.dropout)).view(ctx.shape)


def _turned(gain: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    return (gain[:, None] * b * scale).to(dtype)


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weight.split(max(1, _PIECE // weight.shape[1]))


def _drop(x: torch.Tensor, keep: torch.Tensor, dropout: float) -> torch.Tensor:
    return x * keep / (1 - dropout)


def _tiled(weight: torch.Tensor) -> bool:
    fits = weight.dtype == torch.bfloat16 and weight.shape[1] % 32 == 0
    return fits and compiled.place(weight) == "cpu" and compiled.tiles_at_hand()


def _cross(weight: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    (rows, width), rank = weight.shape, a.shape[0]
    out = torch.empty(rows, rank)
    room = torch.empty(scratch_bytes(width, rank), dtype=torch.uint8)
    compiled.call("cross", rows, width, rank, weight, a, out, room[-room.data_ptr() % 64 :])
    return out


def scratch_bytes(width: int, rank: int) -> int:
    """What the kernel of W Aᵀ works in: A in two parts and turned over; a block of rows and its sums a thread."""
    wide = -(-rank // 32) * 32
    return 8 * wide * width + torch.get_num_threads() * 32 * (2 * width + 4 * wide) + 64


def _register() -> None:
    torch.library.define("ftrun::cross", "(Tensor weight, Tensor a) -> Tensor")
    torch.library.impl("ftrun::cross", "default", _cross)
    torch.library.register_fake(
        "ftrun::cross", lambda weight, a: a.new_empty(weight.shape[0], a.shape[0], dtype=torch.float32)
    )


_register()
