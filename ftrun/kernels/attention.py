"""Attention confined to each row of a packed sequence: no padding, no mask, no leak from row to row.

Three ways to the same sum: row by row through torch's own kernels (any dtype, any device), all rows at once by our
kernel on AMX tiles (bfloat16 on a CPU that has them), all rows at once by torch's variable-length kernel on CUDA.

Shapes: B batch, H query heads, K key-value heads (K divides H), T tokens of all rows together, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ftrun.kernels import compiled


def packed_attention(
    q_BHTD: torch.Tensor,
    k_BKTD: torch.Tensor,
    v_BKTD: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention in which a token sees its own row alone; (B, H, T, D) like the query, any float dtype.

    lengths: tokens of each row, in order; they sum to T. window: a token sees this many tokens, itself counted.
    softcap: scores are capped as c·tanh(s/c) (Gemma 2). Raises AssertionError where lengths do not cover T.
    """
    total = q_BHTD.shape[2]
    assert sum(lengths) == total, f"rows of {sum(lengths)} tokens do not cover a sequence of {total}"
    if softcap is None and not dropout and _all_at_once(q_BHTD, k_BKTD, v_BKTD):
        out: torch.Tensor = _Tiled.apply(q_BHTD, k_BKTD, v_BKTD, list(lengths), scale, min(window or total, total))
        return out
    if softcap is not None:
        return _by_rows(_capped_row, q_BHTD, k_BKTD, v_BKTD, lengths, scale, window, dropout, softcap)
    return _by_rows(_row, q_BHTD, k_BKTD, v_BKTD, lengths, scale, window, dropout)


def _by_rows(row, q, k, v, lengths, scale, window, dropout, *extra):  # type: ignore[no-untyped-def]
    if len(lengths) == 1:
        return row(q, k, v, scale, window, dropout, *extra)
    pieces = zip(*(t.split(tuple(lengths), dim=2) for t in (q, k, v)), strict=True)
    return torch.cat([row(*piece, scale, window, dropout, *extra) for piece in pieces], dim=2)


def _row(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, dropout: float
) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    seen = None if window is None or window >= q.shape[2] else _band(q.shape[2], window, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=seen is None, scale=scale, enable_gqa=grouped
    )


def _capped_row(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, dropout: float, cap: float
) -> torch.Tensor:
    """As transformers' eager attention has it: float32 softmax over capped scores."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (k, v))
    scores = torch.tanh(q @ k.transpose(2, 3) * scale / cap) * cap
    seen = _band(q.shape[2], window or q.shape[2], q.device)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v


def _all_at_once(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether our kernel takes them: one row of batch, heads of one width, whole groups of them."""
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16 or not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return False
    if q.shape[0] != 1 or q.shape[2] == 0 or q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1]:
        return False
    return compiled.place(q) == "cpu" and compiled.tiles_at_hand()


class _Tiled(torch.autograd.Function):
    """All rows at once; the backward pass makes the weights again from each token's log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q, k, v, lengths, scale, window):  # type: ignore[no-untyped-def]
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        out, lse = torch.ops.ftrun.attention(q, k, v, lengths, scale, window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = lengths, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
        found = torch.ops.ftrun.attention_backward(grad, *ctx.saved_tensors, *ctx.how)
        return (*found, None, None, None)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _outputs(q, k, v, lengths, scale, window)
    starts, each, room = _rooms(lengths, q, back=False)
    compiled.call("attention", *_sizes(q, k, starts, scale, window), *_views(q, k, v), out, lse, room, each)
    return out, lse


def _attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (_like(t) for t in (q, k, v))
    starts, each, room = _rooms(lengths, q, back=True)
    shares = q.new_empty(shares_bytes(q, k) // 4, dtype=torch.float32)
    given = (out, grad, lse, dq, dk, dv, shares, room, each)
    compiled.call("attention_backward", *_sizes(q, k, starts, scale, window), *_views(q, k, v), *given)
    return dq, dk, dv


def scratch_bytes(lengths: Sequence[int], width: int, back: bool) -> int:
    """What the kernel's threads need beside its outputs."""
    return torch.get_num_threads() * compiled.scratch("attention", max(lengths), width, back) + 64


def shares_bytes(q: torch.Tensor, k: torch.Tensor) -> int:
    """Each query head's own gradients of keys and values, in float32, where heads share them."""
    return 0 if q.shape[1] == k.shape[1] else 2 * 4 * q.numel()


def _rooms(lengths: Sequence[int], q: torch.Tensor, back: bool) -> tuple[torch.Tensor, int, torch.Tensor]:
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64)
    room = torch.empty(scratch_bytes(lengths, q.shape[-1], back), dtype=torch.uint8)
    return starts, compiled.scratch("attention", max(lengths), q.shape[-1], back), room[-room.data_ptr() % 64 :]


def _sizes(q: torch.Tensor, k: torch.Tensor, starts: torch.Tensor, scale: float, window: int) -> tuple[Any, ...]:
    heads = q.shape[1]
    return starts.numel() - 1, starts, heads, heads // k.shape[1], q.shape[-1], scale, window


def _views(*tensors: torch.Tensor) -> tuple[Any, ...]:
    return tuple(part for t in tensors for part in (t, t.stride(2), t.stride(1)))


def _like(x: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) over memory in the order (B, T, H, D), as the products before and after have it."""
    batch, heads, tokens, size = x.shape
    return x.new_empty(batch, tokens, heads, size).transpose(1, 2)


def _outputs(q: torch.Tensor, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(q), q.new_empty(q.shape[1], q.shape[2], dtype=torch.float32)


def _register() -> None:
    define, implement, fake = torch.library.define, torch.library.impl, torch.library.register_fake
    how = "int[] lengths, float scale, int window"
    define("ftrun::attention", f"(Tensor q, Tensor k, Tensor v, {how}) -> (Tensor, Tensor)")
    implement("ftrun::attention", "default", _attention)
    fake("ftrun::attention", _outputs)
    given = "Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"
    define("ftrun::attention_backward", f"({given}, {how}) -> (Tensor, Tensor, Tensor)")
    implement("ftrun::attention_backward", "default", _attention_backward)
    fake("ftrun::attention_backward", lambda grad, q, k, v, *how: tuple(_like(t) for t in (q, k, v)))


def _band(tokens: int, window: int, device: torch.device) -> torch.Tensor:
    """(T, T) bool: token i sees tokens i - window + 1 … i."""
    distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)[None, :]
    return (distance >= 0) & (distance < window)


_register()
