"""Cross-entropy of the next token: over full logits (reference), or chunk by chunk over supervised tokens (fast).

The fast form never holds (tokens × vocabulary): one chunk of logits lives at a time, and with a frozen head its
gradient is taken in the forward pass, where the logits are at hand, so that nothing is computed twice
(the idea of Liger Kernel's fused linear cross-entropy, Hsu et al. 2024, arXiv:2410.10989).

Shapes: N supervised tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ftrun.kernels import compiled
from ftrun.values import IGNORE

CHUNK = 512  # tokens of logits at once: static, so that the peak can be planned


@dataclass(frozen=True)
class Shape:
    """What a model does to its logits: scaled, then capped as c·tanh(l/c)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The shaped logits, in the dtype given."""
        logits = logits * self.scale if self.scale != 1.0 else logits
        return torch.tanh(logits / self.cap) * self.cap if self.cap is not None else logits


def full_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the losses, in nats, float32: logits (…, V) of any dtype, targets (…) with IGNORE where not learnt."""
    flat = logits.float().flatten(0, -2)
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE, reduction="sum")


def chunked_loss(
    hidden_ND: torch.Tensor,
    targets_N: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    weight_VD: torch.Tensor | None,
    shape: Shape,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Sum of the losses, in nats, float32, without the logits of all tokens at once.

    head: hidden (n, D) -> logits (n, V), called chunk by chunk and recomputed for the backward pass. weight_VD: where
    the head is a frozen matrix and nothing else, that matrix: then each chunk's gradient is taken at once.
    """
    if weight_VD is not None:
        return _FrozenHeadLoss.apply(hidden_ND, weight_VD, targets_N, shape, chunk)
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    for hidden, targets in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True):
        total = total + checkpoint(_head_loss, hidden, targets, head, shape, use_reentrant=False)
    return total


def _head_loss(
    hidden: torch.Tensor, targets: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], shape: Shape
) -> torch.Tensor:
    logits = shape(head(hidden)).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, targets, shape, chunk):  # type: ignore[no-untyped-def]
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        # one room for all chunks: a new one each time is a new set of pages
        room = hidden.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            part, into = hidden[start : start + chunk], None if gradient is None else gradient[start : start + chunk]
            logits = torch.mm(part, weight.T, out=room[: part.shape[0]])
            total += _chunk(logits, weight, targets[start : start + chunk], shape, into)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


def _chunk(
    logits: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, shape: Shape, gradient: torch.Tensor | None
) -> torch.Tensor:
    """The chunk's loss; d loss / d hidden is written into `gradient` where it is given. Spends the logits."""
    cap = 0.0 if shape.cap is None else shape.cap
    losses: torch.Tensor
    if fused(logits):
        losses = torch.ops.ftrun.cross_entropy_(logits, targets, shape.scale, cap, gradient is not None)
    else:
        wide = logits.float()
        losses = _cross_entropy(wide, targets, shape.scale, cap, gradient is not None)
        logits = logits if wide is logits else logits.copy_(wide)
    if gradient is not None:
        torch.mm(logits, weight, out=gradient)
    return losses.sum()


def fused(logits: torch.Tensor) -> bool:
    """Whether the loss is one operation on the logits as they are: where kernels are compiled for their device."""
    return compiled.takes(logits)


def _cross_entropy_(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, cap: float, gradient: bool
) -> torch.Tensor:
    """Each row's loss, (n,) float32; the logits (n, V) become their own gradients where `gradient` is asked for.

    Targets of IGNORE have no loss and no gradient.
    """
    if logits.is_cuda:
        return _on_cuda(logits, targets, scale, cap, gradient)
    losses = torch.empty(logits.shape[0], dtype=torch.float32)
    half = logits.dtype == torch.bfloat16
    compiled.call("cross_entropy", half, *logits.shape, logits, targets, scale, cap, gradient, losses)
    return losses


@compiled.on_cuda
def _on_cuda(logits: torch.Tensor, targets: torch.Tensor, scale: float, cap: float, gradient: bool) -> torch.Tensor:
    wide = logits.float()
    losses = _cross_entropy(wide, targets, scale, cap, gradient)
    logits.copy_(wide)
    return losses


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, cap: float, gradient: bool
) -> torch.Tensor:
    """The same in plain torch, on float32 logits."""
    learnt = targets != IGNORE
    picks = targets.clamp_min(0)[:, None]
    if scale != 1.0:
        logits *= scale
    if cap:
        logits.div_(cap).tanh_().mul_(cap)
    bend = 1 - (logits / cap).square_() if cap and gradient else None
    picked, largest = logits.gather(-1, picks), logits.amax(-1, keepdim=True)
    # from here on in the logits' own memory: logsumexp and a scaled copy would each take as much again
    logits.sub_(largest).exp_()
    total = logits.sum(-1, keepdim=True)
    if gradient:
        logits.div_(total)  # softmax
        logits.scatter_add_(-1, picks, logits.new_full((len(targets), 1), -1.0))
        if bend is not None:
            logits *= bend
        if scale != 1.0:
            logits *= scale
        logits *= learnt[:, None]
    return (total.log() + largest - picked).squeeze(-1) * learnt


def _register() -> None:
    how = "Tensor targets, float scale, float cap, bool gradient"
    torch.library.define("ftrun::cross_entropy_", f"(Tensor(a!) logits, {how}) -> Tensor")
    torch.library.impl("ftrun::cross_entropy_", "default", _cross_entropy_)
    torch.library.register_fake(
        "ftrun::cross_entropy_", lambda logits, *how: logits.new_empty(logits.shape[0], dtype=torch.float32)
    )


_register()
