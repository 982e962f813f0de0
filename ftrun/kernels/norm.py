"""Root mean square norm (Zhang & Sennrich 2019) over the last dimension as one operation, for a frozen weight.

y = w · x / √(mean(x²) + eps), in float32, rounded where a family's code rounds. The form is "twice" (after the norm and
after the weight: Llama), "last" (at the end alone: OLMo 2) or "plus_one" (so too, of a weight that is kept less 1:
Gemma). Kept for the backward pass: x and one float32 number a token, where the plain graph keeps three float32 copies
of x.
"""

from __future__ import annotations

from typing import Any

import torch

from ftrun.kernels import compiled

FORMS = ("twice", "last", "plus_one")  # in the order in which the compiled kernel counts them


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float, form: str) -> torch.Tensor:
    """x (…, D) of any float dtype, weight (D,) -> (…, D) in the dtype of x."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if form == "twice":
        return weight * normed.to(x.dtype)
    return (normed * (weight.float() + (form == "plus_one"))).to(x.dtype)


def fast(x: torch.Tensor, weight: torch.Tensor, eps: float, form: str) -> torch.Tensor:
    """The value of `reference`, with the gradient of x. weight: frozen, of the dtype of x."""
    out: torch.Tensor = _RMSNorm.apply(x, weight, eps, form)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, form: str) -> torch.Tensor:
        x = x.contiguous()
        y, rstd = torch.ops.ftrun.rms_norm(x, weight, eps, form)
        ctx.save_for_backward(x, weight, rstd)
        ctx.form = form
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        return torch.ops.ftrun.rms_norm_backward(grad.contiguous(), x, weight, rstd, ctx.form), None, None, None


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    if x.is_cuda:
        return _on_cuda(x, weight, eps, form)
    y, rstd = _empty(x, weight, eps, form)
    compiled.call("rms_norm", _half(x), rstd.numel(), x.shape[-1], x, weight, eps, FORMS.index(form), y, rstd)
    return y, rstd


def _rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, form: str
) -> torch.Tensor:
    if x.is_cuda:
        return _back_on_cuda(grad, x, weight, rstd, form)
    dx = torch.empty_like(x)
    count = rstd.numel()
    given = (grad, x, weight, rstd, form == "plus_one", dx)
    compiled.call("rms_norm_backward", _half(x), count, x.shape[-1], *given)
    return dx


@compiled.on_cuda
def _on_cuda(x: torch.Tensor, weight: torch.Tensor, eps: float, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    return reference(x, weight, eps, form), torch.rsqrt(x.float().square().mean(-1) + eps)


@compiled.on_cuda
def _back_on_cuda(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, form: str
) -> torch.Tensor:
    pull, normed = grad.float() * (weight.float() + (form == "plus_one")), x.float() * rstd.unsqueeze(-1)
    return (rstd.unsqueeze(-1) * (pull - normed * (pull * normed).mean(-1, keepdim=True))).to(x.dtype)


def _empty(x: torch.Tensor, weight: torch.Tensor, eps: float, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _half(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _register() -> None:
    define, implement, fake = torch.library.define, torch.library.impl, torch.library.register_fake
    define("ftrun::rms_norm", "(Tensor x, Tensor weight, float eps, str form) -> (Tensor, Tensor)")
    implement("ftrun::rms_norm", "default", _rms_norm)
    fake("ftrun::rms_norm", _empty)
    define("ftrun::rms_norm_backward", "(Tensor grad, Tensor x, Tensor weight, Tensor rstd, str form) -> Tensor")
    implement("ftrun::rms_norm_backward", "default", _rms_norm_backward)
    fake("ftrun::rms_norm_backward", lambda grad, x, weight, rstd, form: torch.empty_like(x))


_register()
