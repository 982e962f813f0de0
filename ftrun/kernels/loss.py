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
    return F.cross_entropy(shape(head(hidden)).float(), targets, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, targets, shape, chunk):  # type: ignore[no-untyped-def]
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            total += _chunk(hidden[rows], weight, targets[rows], shape, None if gradient is None else gradient[rows])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


def _chunk(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, shape: Shape, gradient: torch.Tensor | None
) -> torch.Tensor:
    """The chunk's loss; d loss / d hidden is written into `gradient` where it is given."""
    logits = shape(F.linear(hidden, weight)).float()
    bend = None if gradient is None or shape.cap is None else 1 - (logits / shape.cap).square_()
    picked = logits.gather(-1, targets[:, None])
    largest = logits.amax(-1, keepdim=True)
    # from here on in the logits' own memory: logsumexp and a scaled copy would each take as much again
    logits.sub_(largest).exp_()
    total = logits.sum(-1, keepdim=True)
    if gradient is not None:
        logits.div_(total)  # softmax
        logits.scatter_add_(-1, targets[:, None], logits.new_full((len(targets), 1), -1.0))
        if bend is not None:
            logits *= bend
        if shape.scale != 1.0:
            logits *= shape.scale
        logits = logits.to(hidden.dtype)  # the float32 ones are gone before the product takes room for itself
        torch.mm(logits, weight, out=gradient)
    return (total.log() + largest - picked).sum()
