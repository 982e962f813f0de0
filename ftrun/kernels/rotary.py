"""Rotary positions (Su et al. 2021) in the halves' form: numbers i and i + R/2 of a head are turned as a pair.

One operation for any number of heads, forward and (turning back) backward; nothing but the angles is kept.
"""

from __future__ import annotations

from typing import Any

import torch

from ftrun.kernels import compiled


def reference(x_BHTD: torch.Tensor, cosine_BTR: torch.Tensor, sine_BTR: torch.Tensor) -> torch.Tensor:
    """Heads (B, H, T, D) turned by their tokens' angles (B, T, R); numbers from R on stay as they are."""
    turned = cosine_BTR.shape[-1]
    x, rest = x_BHTD[..., :turned], x_BHTD[..., turned:]
    first, second = x.chunk(2, dim=-1)
    out = x * cosine_BTR.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sine_BTR.unsqueeze(1)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


def fast(x_BHTD: torch.Tensor, cosine_BTR: torch.Tensor, sine_BTR: torch.Tensor) -> torch.Tensor:
    """The value of `reference`, with the gradient of x; (B, H, T, D) over memory in the order (B, T, H, D).

    B is 1. Angles of another dtype than x, as autocast may leave them, are taken the plain way.
    """
    if not compiled.takes(x_BHTD, cosine_BTR, sine_BTR):  # of two dtypes, as under autocast
        return reference(x_BHTD, cosine_BTR, sine_BTR)
    out: torch.Tensor = _Rotary.apply(x_BHTD, cosine_BTR, sine_BTR)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        out: torch.Tensor = torch.ops.ftrun.rope(x, cosine, sine, False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.ops.ftrun.rope(grad, *ctx.saved_tensors, True), None, None


def _rope(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, back: bool) -> torch.Tensor:
    if x.is_cuda:
        return _on_cuda(x, cosine, sine, back)
    out = _like(x)
    x = x if x.stride(-1) == 1 else x.contiguous()
    cosine, sine = cosine.contiguous(), sine.contiguous()
    heads, tokens, size = x.shape[1:]
    sizes = (x.dtype == torch.bfloat16, tokens, heads, size, cosine.shape[-1])
    places = (x, x.stride(2), x.stride(1), cosine, sine, out, out.stride(2), out.stride(1))
    compiled.call("rope", *sizes, *places, back)
    return out


@compiled.on_cuda
def _on_cuda(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, back: bool) -> torch.Tensor:
    if not back:
        return reference(x, cosine, sine)
    turned = cosine.shape[-1]
    pull, rest = x[..., :turned], x[..., turned:]
    first, second = (pull * sine.unsqueeze(1)).chunk(2, dim=-1)
    out = pull * cosine.unsqueeze(1) + torch.cat((second, -first), dim=-1)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


def _like(x: torch.Tensor) -> torch.Tensor:
    batch, heads, tokens, size = x.shape
    return x.new_empty(batch, tokens, heads, size).transpose(1, 2)


def _register() -> None:
    torch.library.define("ftrun::rope", "(Tensor x, Tensor cosine, Tensor sine, bool back) -> Tensor")
    torch.library.impl("ftrun::rope", "default", _rope)
    torch.library.register_fake("ftrun::rope", lambda x, cosine, sine, back: _like(x))


_register()
