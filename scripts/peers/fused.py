"""fms-acceleration's fused kernels (plugins/fused-ops-and-kernels): the tensors they make and keep, no arithmetic.

Each stand-in follows the kernel's Python side line by line; what Triton writes in place is left as it is.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


class RMSNorm(torch.autograd.Function):
    """unsloth's Fast_RMS_Layernorm: keeps the input and a scale a row, writes the gradient over the one it gets."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1, x.shape[-1])
        y = torch.empty_like(flat)
        ctx.save_for_backward(flat, weight, flat.new_empty(flat.shape[0], dtype=torch.float32))
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


class Rope(torch.autograd.Function):
    """unsloth's Fast_RoPE_Embedding: in place, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, heads, width = x.shape
        return x.view(batch * tokens, heads * width).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        batch, tokens, heads, width = grad.shape
        return grad.reshape(batch * tokens, heads * width).view(grad.shape)


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any) -> Any:
    """In place of transformers' apply_rotary_pos_emb."""
    return Rope.apply(q.transpose(1, 2)).transpose(1, 2), Rope.apply(k.transpose(1, 2)).transpose(1, 2)


class LinearCrossEntropy(torch.autograd.Function):
    """Liger's fused linear layer and loss, a chunk of tokens at a time; gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        tokens, hidden = x.shape
        vocab = weight.shape[0]
        chunk = 1 << (-(-tokens // -(-vocab // hidden)) - 1).bit_length()
        grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
        grad_x = torch.zeros_like(x)
        losses = torch.zeros(tokens, dtype=torch.float32)
        for start in range(0, tokens, chunk):
            part = x[start : start + chunk]
            logits = part @ weight.t()
            logits = logits.float()
            logits = logits.to(x.dtype)
            scaled = logits * 1.0
            grad_x[start : start + chunk] = scaled @ weight
            if grad_weight is not None:
                torch.addmm(grad_weight, logits.t(), part, out=grad_weight)
        ctx.save_for_backward(grad_x, grad_weight)
        return torch.sum(losses)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return *ctx.saved_tensors, None


def patch(model: nn.Module, linear_loss: bool) -> None:
    """Norms, rotary embeddings and, where asked for, the head with its loss."""
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    for norm in norms:
        norm.forward = (lambda n: lambda x: RMSNorm.apply(x, n.weight))(norm)  # type: ignore[method-assign]
    if norms:
        sys.modules[type(norms[0]).__module__].apply_rotary_pos_emb = rope  # type: ignore[attr-defined]
    if linear_loss:
        model.lm_head.forward = lambda x: x  # type: ignore[union-attr, method-assign, assignment]
        model.loss_function = _linear_loss(model)  # type: ignore[assignment]
        model.register_forward_hook(lambda module, args, out: out.__setitem__("logits", None) or out)


def _linear_loss(model: Any) -> Any:
    def loss(logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden = logits[..., :-1, :].contiguous()
        shift_labels = labels[..., 1:].contiguous()
        return LinearCrossEntropy.apply(hidden.view(-1, hidden.shape[-1]), model.lm_head.weight, shift_labels.view(-1))

    return loss
