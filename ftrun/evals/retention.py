"""What fine-tuning broke: the rise in loss on text that the untuned base itself wrote. No data set is needed for it.

The base samples rows from its own distribution, so their loss estimates the base's entropy, and the rise after tuning
the divergence of the tuned model from the base, KL(base ‖ tuned) a token, on what the base would say.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ftrun.evals.answer import ends, generated

# the model's own distribution: nothing that its generation config may say of penalties and cut tails
SAMPLED: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


@dataclass(frozen=True)
class Text:
    """ids: rows of token ids, each from the start token on. loss: the base's own, nats a token, on `tokens` of them."""

    ids: list[list[int]]
    loss: float
    tokens: int

    @classmethod
    def read(cls, found: Any, vocabulary: int) -> Text | None:
        """From a file's object; None where it is not such a text of a model with so many tokens."""
        if not isinstance(found, Mapping) or set(found) != {"ids", "loss", "tokens"} or not found["ids"]:
            return None
        ids, loss, tokens = found["ids"], found["loss"], found["tokens"]
        rows = isinstance(ids, list) and all(isinstance(row, list) and len(row) > 1 for row in ids)
        known = rows and all(isinstance(i, int) and 0 <= i < vocabulary for row in ids for i in row)
        finite = isinstance(loss, int | float) and math.isfinite(loss)
        return cls(ids, float(loss), tokens) if known and finite and tokens == sum(len(r) - 1 for r in ids) else None


def start_of(tokenizer: Any, vocabulary: int) -> int | None:
    """The token that a text starts from: bos, where there is none eos; None where the model has neither."""
    found = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((i for i in found if i is not None and i < vocabulary), None)


def write(model: Any, tokenizer: Any, start: int, rows: int, tokens: int, seed: int) -> list[list[int]]:
    """So many rows that the model writes after `start`, sampled at temperature 1, all as one batch with a cache.

    Each has up to `tokens` tokens after `start`; one that reaches an end token ends with it. The generators that
    training draws from are left as they were.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        out = generated(model, tokenizer, [[start]] * rows, tokens, **SAMPLED)
    last = set(ends(model, tokenizer))
    return [[start, *_ended(row, last)] for row in out.tolist()]


def _ended(row: list[int], last: Collection[int]) -> list[int]:
    """The row up to its first end token, that one with it."""
    place = next((i for i, token in enumerate(row) if token in last), len(row))
    return row[: place + 1]


def figures(text: Text, after: float) -> dict[str, float]:
    """As result.json has them: the loss before and after, nats a token, the rise, and the tokens scored."""
    return {"before": text.loss, "after": after, "rise": after - text.loss, "tokens": text.tokens}
