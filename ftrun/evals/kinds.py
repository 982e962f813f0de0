"""Tokens by what they write: numbers and structured output suffer first where weights lose precision."""

from __future__ import annotations

from typing import Any

import torch

KINDS = ("numbers", "structure", "words")
_MARKS = frozenset("{}[]()<>\"':;,=/|#*_-`\\")


def kind_of(text: str) -> str:
    """A token's kind: "numbers" where it holds a digit, "structure" where it is marks of JSON or markup and nothing
    else, "words" for the rest.
    """
    if any(c.isdigit() for c in text):
        return "numbers"
    marks = text.strip()
    return "structure" if marks and set(marks) <= _MARKS else "words"


def masks(tokens: torch.Tensor, tokenizer: Any) -> dict[str, torch.Tensor]:
    """tokens (N,) int64 -> for each kind, (N,) bool: where they are of it. Special tokens are words."""
    distinct, place = tokens.unique(return_inverse=True)
    special = set(tokenizer.all_special_ids)
    found = [KINDS.index("words" if i in special else kind_of(tokenizer.decode([i]))) for i in distinct.tolist()]
    of = torch.tensor(found, dtype=torch.int64)[place]
    return {name: of == number for number, name in enumerate(KINDS)}


def by_kind(values: torch.Tensor, found: dict[str, torch.Tensor]) -> dict[str, float | None]:
    """The mean of values (N,) over each kind's tokens; None where there is none."""
    return {name: float(values[mask].double().mean()) if bool(mask.any()) else None for name, mask in found.items()}
