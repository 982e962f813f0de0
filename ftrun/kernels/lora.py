"""LoRA's product beside a frozen linear layer (Hu et al. 2021, eq. 3): y = x Wᵀ + bias + s (drop(x) Aᵀ) Bᵀ.

`reference` is plain autograd. `fast` is one autograd node for base and update, and for all layers that read the same
input (q, k and v; gate and up): it keeps the input once (where the plain graph keeps it for the base and again, after
dropout, for A), and asks for the frozen weight anew in the backward pass, so that a dequantised weight never outlives
the product that needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ftrun.kernels.dense import dense_weight, is_linear


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


@dataclass(frozen=True)
class Factors:
    """A frozen linear layer and, where it has one, the update beside it.

    weight: makes the frozen (out, in) matrix in a dtype; called once forward, once backward where the input needs a
    gradient. bias (out,). a (rank, in), b (out, rank): of any float dtype; None where the layer is not tuned.
    """

    weight: Callable[[torch.dtype], torch.Tensor]
    bias: torch.Tensor | None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]


def fast(x: torch.Tensor, *layers: Factors, dropout: float = 0.0) -> tuple[torch.Tensor, ...]:
    """For each layer the value of `reference` for its base(x) = x · weightᵀ + bias, with the gradients of x, a and b.

    Layers that read the same input share it: it is kept once, is multiplied by all A at once, and collects its
    gradient in one tensor. Gradients of a and b have their own dtype (float32), whatever x is. At least one layer has
    an update; dropout: the same part of the input for all of them.
    """
    trained = [t for layer in layers if layer.a is not None for t in (layer.a, layer.b)]
    found: tuple[torch.Tensor, ...] = _LoRA.apply(x, layers, dropout, *trained)
    return found


def together(x: torch.Tensor, layers: Sequence[nn.Module]) -> Sequence[torch.Tensor]:
    """What each of these linear layers makes of the same input: by one node of `fast` where that is possible.

    A tuned layer says so by a method `factors() -> Factors | None`; frozen ones beside it need none.
    """
    found = [_factors_of(layer) for layer in layers]
    if any(one is None for one in found) or not any(one.rank for one in found if one is not None):
        return [layer(x) for layer in layers]
    return fast(x, *(one for one in found if one is not None))


def _factors_of(layer: nn.Module) -> Factors | None:
    if hasattr(layer, "factors"):
        own: Factors | None = layer.factors()  # type: ignore[operator]
        return own
    if not is_linear(layer) or any(p.requires_grad for p in layer.parameters()):
        return None
    return Factors(functools.partial(dense_weight, layer), getattr(layer, "bias", None))


class _LoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layers: tuple[Factors, ...], dropout: float, *trained: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        rows, dtype = x.reshape(-1, x.shape[-1]), x.dtype
        keep = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
        a = trained[::2]
        hidden = _drop(rows, keep, dropout) @ _stacked(a, dtype).T
        found, parts = [], iter(zip(hidden.split([t.shape[0] for t in a], dim=1), trained[1::2], strict=True))
        for layer in layers:
            bias = None if layer.bias is None else layer.bias.to(dtype)
            out = F.linear(rows, layer.weight(dtype), bias)
            if layer.a is not None:
                part, b = next(parts)
                out.addmm_(part, b.to(dtype).T, alpha=layer.scale)
            found.append(out.view(*x.shape[:-1], out.shape[-1]))
        ctx.save_for_backward(rows, hidden, keep, *trained)
        ctx.layers = [(layer.weight, layer.rank, layer.scale) for layer in layers]
        ctx.dropout, ctx.shape = dropout, x.shape
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, hidden, keep, *trained = ctx.saved_tensors
        grads = tuple(g.reshape(-1, g.shape[-1]) for g in grads)
        dtype, a, b = rows.dtype, trained[::2], trained[1::2]
        tuned = [(g, scale) for g, (_, rank, scale) in zip(grads, ctx.layers, strict=True) if rank]
        parts = hidden.split([t.shape[0] for t in a], dim=1)
        grad_b = [(g.T @ part).to(t.dtype).mul_(s) for (g, s), part, t in zip(tuned, parts, b, strict=True)]
        narrow = [g @ (t * s).to(dtype) for (g, s), t in zip(tuned, b, strict=True)]
        together = narrow[0] if len(narrow) == 1 else torch.cat(narrow, dim=1)
        whole = (together.T @ _drop(rows, keep, ctx.dropout)).to(a[0].dtype)
        grad_a = whole.split([t.shape[0] for t in a])
        grad_x = _to_input(ctx, grads, together, a, keep) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, *(t for pair in zip(grad_a, grad_b, strict=True) for t in pair)


def _to_input(
    ctx: Any,
    grads: tuple[torch.Tensor, ...],
    narrow: torch.Tensor,
    a: Sequence[torch.Tensor],
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """The input's gradient, summed over the layers in one tensor."""
    dtype, total = grads[0].dtype, None
    for grad, (weight, _, _) in zip(grads, ctx.layers, strict=True):
        total = grad @ weight(dtype) if total is None else total.addmm_(grad, weight(dtype))
    assert total is not None
    if keep is None:
        return total.addmm_(narrow, _stacked(a, dtype)).view(ctx.shape)
    return total.add_(_drop(narrow @ _stacked(a, dtype), keep, ctx.dropout)).view(ctx.shape)


def _stacked(a: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """All A, one under another: (sum of ranks, in)."""
    return a[0].to(dtype) if len(a) == 1 else torch.cat([t.to(dtype) for t in a])


def _drop(x: torch.Tensor, keep: torch.Tensor | None, dropout: float) -> torch.Tensor:
    return x if keep is None else x * keep / (1 - dropout)
