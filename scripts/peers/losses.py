"""The loss as each version of transformers, and each kernel that replaces it, computes it: what it holds differs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def shifted_copy(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
    """transformers 4.46 to 4.49, loss/loss_utils.py, and the models' own code before: float32, then a shifted copy."""
    logits = logits.float()
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous()
    shift_logits = shift_logits.view(-1, vocab_size)
    return F.cross_entropy(shift_logits, shift_labels.view(-1))


def shifted_half(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
    """gpt_bigcode's own code in transformers up to 4.48: a shifted copy in the model's dtype."""
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous()
    return F.cross_entropy(shift_logits.view(-1, vocab_size), shift_labels.view(-1))


def shifted_labels(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
    """transformers 4.50 and later: float32 logits, the labels padded and shifted instead."""
    logits = logits.float()
    labels = F.pad(labels, (0, 1), value=-100)
    shift_labels = labels[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, vocab_size), shift_labels.view(-1))


class FastCrossEntropy(torch.autograd.Function):
    """unsloth's Triton kernel (fms-acceleration, kernels/unsloth): the gradient is written over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows, chunks = logits.shape[0], -(-logits.shape[1] // 65536)
        losses = logits.new_empty(rows, dtype=torch.float32)
        lse = logits.new_empty((rows, chunks) if chunks > 1 else (rows,), dtype=torch.float32)
        if chunks > 1:
            lse = torch.logsumexp(lse, dim=1)
        ctx.save_for_backward(logits, lse, labels)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.saved_tensors[0], None


def fast_shifted(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
    """shifted_copy with unsloth's kernel in place of cross_entropy."""
    logits = logits.float()
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous().view(-1)
    losses = FastCrossEntropy.apply(shift_logits.view(-1, vocab_size), shift_labels)
    return losses.sum() / torch.count_nonzero(shift_labels != -100)


def fast_shifted_half(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
    """shifted_half with unsloth's kernel in place of cross_entropy: autocast does not know it."""
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous().view(-1)
    losses = FastCrossEntropy.apply(shift_logits.view(-1, vocab_size), shift_labels)
    return losses.sum() / torch.count_nonzero(shift_labels != -100)
