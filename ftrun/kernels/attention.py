"""Attention confined to each row of a packed sequence: no padding, no mask, no leak from row to row.

Shapes: B batch, H query heads, K key-value heads (K divides H), T tokens of all rows together, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


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


def _band(tokens: int, window: int, device: torch.device) -> torch.Tensor:
    """(T, T) bool: token i sees tokens i - window + 1 … i."""
    distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)[None, :]
    return (distance >= 0) & (distance < window)
