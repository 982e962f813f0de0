"""How long a model takes for a token that it generates, as a user would wait for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from ftrun.evals.answer import GREEDY, generated

ROUNDS = 3


def milliseconds(model: Any, tokenizer: Any, prompt_ids: Sequence[int], tokens: int) -> float:
    """Milliseconds a token, the best of three times: one row, greedy, with the cache, the prompt's own pass included.

    An end token is passed over for the next best, so that each model generates the same count.
    """
    return min(_seconds(model, tokenizer, prompt_ids, tokens) for _ in range(ROUNDS)) * 1e3 / tokens


def _seconds(model: Any, tokenizer: Any, prompt_ids: Sequence[int], tokens: int) -> float:
    _wait(model.device)
    started = time.perf_counter()
    out = generated(model, tokenizer, [prompt_ids], tokens, min_new_tokens=tokens, **GREEDY)
    _wait(model.device)
    assert out.shape[1] == tokens, f"{out.shape[1]} tokens of {tokens}"
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
