"""LoRA's product beside a frozen linear layer (Hu et al. 2021, eq. 3): y = x Wᵀ + bias + s (drop(x) Aᵀ) Bᵀ.

`reference` is plain autograd. `fast` is one autograd node for base and update, and for all layers that read the same
input (q, k and v; gate and up): it keeps the input once (where the plain graph keeps it for the base and again, after
dropout, for A), and asks for the frozen weight anew in the backward pass, so that a dequantised weight never outlives
the product that needs it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ftrun.kernels import compiled, linear
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
    gain: DoRA's, from that matrix, (out,) float32 and a constant of the backward pass: what base and update give is
    multiplied by it, before the bias; magnitude (out,): trained, what the gain is proportional to.
    """

    weight: Callable[[torch.dtype], torch.Tensor]
    bias: torch.Tensor | None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    gain: Callable[[torch.Tensor], torch.Tensor] | None = None
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]


def fast(x: torch.Tensor, *layers: Factors, dropout: float = 0.0) -> tuple[torch.Tensor, ...]:
    """For each layer the value of `reference` for its base(x) = x · weightᵀ + bias, with the gradients of x, a and b.

    Layers that read the same input share it: it is kept once, is multiplied by all A at once, and collects its
    gradient in one tensor. Gradients of a and b have their own dtype (float32), whatever x is. At least one layer has
    an update; dropout: the same part of the input for all of them.
    """
    found: tuple[torch.Tensor, ...] = _LoRA.apply(
        x,
        layers,
        dropout,
        *(layer.a for layer in layers),
        *(layer.b for layer in layers),
        *(layer.magnitude for layer in layers),
    )
    return found


@dataclass(frozen=True)
class Settled:
    """Factors whose values do not change any more, ready for use: a (rank, in) and b (rank, out) in the dtype of the
    inputs, scale and gain in b; surplus (out,): gain − 1, shift (out,): what takes the gain off the base's bias.
    """

    a: torch.Tensor
    b: torch.Tensor
    surplus: torch.Tensor | None
    shift: torch.Tensor | None


def settled(layer: Factors, dtype: torch.dtype) -> Settled:
    """The layer's update for `joined`, for inputs of `dtype`. The layer has one."""
    assert layer.a is not None
    assert layer.b is not None
    a, b = layer.a.detach(), layer.b.detach() * layer.scale
    if layer.gain is None:
        return Settled(a.to(dtype), b.T.to(dtype).contiguous(), None, None)
    gain = layer.gain(layer.weight(dtype))
    shift = None if layer.bias is None else (layer.bias.float() * (1 - gain)).to(dtype)
    return Settled(a.to(dtype), (gain[:, None] * b).T.to(dtype).contiguous(), (gain - 1).to(dtype), shift)


def joined(x: torch.Tensor, out: torch.Tensor, layer: Settled) -> torch.Tensor:
    """The layer's output, its base's own being `out` (…, out), which is changed in place; without a gradient.

    Two narrow products and a sum are all that it takes beside the base's; what `out` was rounded to stays so.
    """
    rows = out.view(-1, out.shape[-1])
    if layer.surplus is not None:
        rows.addcmul_(rows, layer.surplus)
        if layer.shift is not None:
            rows.add_(layer.shift)
    rows.addmm_(F.linear(x.reshape(-1, x.shape[-1]), layer.a), layer.b)
    return out


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
    """The layers' A, B and magnitudes come as arguments (None where a layer has none), for the sake of autograd."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layers: tuple[Factors, ...], dropout: float, *trained: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        rows, dtype = x.reshape(-1, x.shape[-1]), x.dtype
        keep = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
        tile = linear.tile(rows)
        hidden = linear.product([_drop(rows, keep, dropout)], [_all_a(layers, dtype, tile)], turned=True)
        found, scaled, gains = [], [], []
        for layer, place in zip(layers, _places(layers, tile), strict=True):
            out, gain = _output(rows, layer, hidden[:, place])
            scaled.append(None if gain is None else out)
            gains.append(gain)
            if gain is not None and layer.bias is not None:
                out = out + layer.bias.to(dtype)
            found.append(out.view(*x.shape[:-1], out.shape[-1]))
        ctx.save_for_backward(rows, hidden, keep, *gains, *scaled)
        ctx.layers, ctx.dropout, ctx.shape, ctx.tile = layers, dropout, x.shape, tile
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, hidden, keep, *more = ctx.saved_tensors
        layers: tuple[Factors, ...] = ctx.layers
        gains, scaled = more[: len(layers)], more[len(layers) :]
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_m: list[torch.Tensor | None] = [None] * len(layers)
        for i, (layer, gain) in enumerate(zip(layers, gains, strict=True)):
            if gain is not None and layer.magnitude is not None:
                flat[i], sums = unscaled(flat[i], scaled[i], gain)
                m = layer.magnitude
                grad_m[i] = torch.where(m == 0, 0, sums / m).to(m.dtype)
        places = _places(layers, ctx.tile)
        narrow = linear.product(*_tuned(flat, layers, ctx.tile), turned=False)
        grad_b = [
            None
            if layer.b is None
            else (grad.T @ hidden[:, place][:, : layer.rank]).to(layer.b.dtype).mul_(layer.scale)
            for grad, layer, place in zip(flat, layers, places, strict=True)
        ]
        whole = narrow.T @ _drop(rows, keep, ctx.dropout)
        # copies of float32: no gradient is a part of another's memory
        grad_a = [
            None if layer.a is None else whole[place][: layer.rank].to(layer.a.dtype, copy=True)
            for layer, place in zip(layers, places, strict=True)
        ]
        grad_x = _to_input(ctx, flat, narrow, keep) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, *grad_a, *grad_b, *grad_m


def _output(rows: torch.Tensor, layer: Factors, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The layer's product and, where it has one, its gain: then the bias is left out."""
    matrix = layer.weight(rows.dtype)
    gain = None if layer.gain is None else layer.gain(matrix)
    bias = None if layer.bias is None or gain is not None else layer.bias.to(rows.dtype)
    if layer.b is None:
        return linear.product([rows], [matrix], turned=True, bias=bias), gain
    b = _wide((layer.b * layer.scale).to(rows.dtype), hidden.shape[1])
    return linear.product([rows, hidden], [matrix, b], turned=True, bias=bias, gain=gain), gain


def _tuned(
    grads: Sequence[torch.Tensor], layers: tuple[Factors, ...], tile: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The outputs' gradients that meet a B, and these B, each in its own columns of `hidden`."""
    width, places = _width(layers, tile), _places(layers, tile)
    found = [
        (grad, _wide((layer.b * layer.scale).to(grad.dtype), width, place.start))
        for grad, layer, place in zip(grads, layers, places, strict=True)
        if layer.b is not None
    ]
    return [grad for grad, _ in found], [b for _, b in found]


def _places(layers: Sequence[Factors], tile: int) -> list[slice]:
    """Each layer's columns of `hidden`: its rank, filled up to whole tiles by columns that meet zeros."""
    starts = [0, *itertools.accumulate(layer.rank for layer in layers)]
    return [slice(start, start + linear.filled(layer.rank, tile)) for start, layer in zip(starts, layers, strict=False)]


def _width(layers: Sequence[Factors], tile: int) -> int:
    """The columns of `hidden`."""
    return linear.filled(max(place.stop for place in _places(layers, tile)), tile)


def _wide(b: torch.Tensor, columns: int, start: int = 0) -> torch.Tensor:
    """B (out, rank) among zeros: (out, columns)."""
    rank = b.shape[1]
    return b if rank == columns else F.pad(b, (start, columns - rank - start))


def _all_a(layers: Sequence[Factors], dtype: torch.dtype, tile: int) -> torch.Tensor:
    """All A, one under another, and zeros: (columns of `hidden`, in)."""
    found = [layer.a.to(dtype) for layer in layers if layer.a is not None]
    rest = _width(layers, tile) - sum(a.shape[0] for a in found)
    whole = found[0] if len(found) == 1 else torch.cat(found)
    return F.pad(whole, (0, 0, 0, rest)) if rest else whole


def unscaled(grad: torch.Tensor, y: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad · gain, the sums of grad · y over rows as (out,) float32)."""
    if compiled.takes(grad, y):
        found: tuple[torch.Tensor, torch.Tensor] = torch.ops.ftrun.scale_columns_backward(grad.contiguous(), y, gain)
        return found
    sums = torch.linalg.vecdot(grad.T, y.T).float()
    return torch.addcmul(grad, grad, (gain - 1).to(grad.dtype)), sums


def _to_input(ctx: Any, grads: Sequence[torch.Tensor], narrow: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """The input's gradient, summed over the layers in one product."""
    dtype, layers = narrow.dtype, ctx.layers
    weights = [layer.weight(dtype) for layer in layers]
    if keep is None:
        return linear.product([*grads, narrow], [*weights, _all_a(layers, dtype, ctx.tile)], turned=False).view(
            ctx.shape
        )
    total = linear.product(grads, weights, turned=False)
    return total.add_(_drop(narrow @ _all_a(layers, dtype, ctx.tile), keep, ctx.dropout)).view(ctx.shape)


def _drop(x: torch.Tensor, keep: torch.Tensor | None, dropout: float) -> torch.Tensor:
    return x if keep is None else x * keep / (1 - dropout)


def _scale_columns_backward(
    grad: torch.Tensor, y: torch.Tensor, gain: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if grad.is_cuda:
        return _back_on_cuda(grad, y, gain)
    scaled, sums = torch.empty_like(grad), torch.empty_like(gain)
    given = (grad, y, gain, scaled, sums)
    compiled.call("scale_columns_backward", grad.dtype == torch.bfloat16, *grad.shape, *given)
    return scaled, sums


@compiled.on_cuda
def _back_on_cuda(grad: torch.Tensor, y: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (grad * gain).to(grad.dtype), (grad.float() * y).sum(0)


def _register() -> None:
    define, implement, fake = torch.library.define, torch.library.impl, torch.library.register_fake
    define("ftrun::scale_columns_backward", "(Tensor grad, Tensor y, Tensor gain) -> (Tensor, Tensor)")
    implement("ftrun::scale_columns_backward", "default", _scale_columns_backward)
    fake("ftrun::scale_columns_backward", lambda grad, y, gain: (torch.empty_like(grad), torch.empty_like(gain)))


_register()
