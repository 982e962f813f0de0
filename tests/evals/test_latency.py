"""Milliseconds a token: of as many tokens as asked, whatever the model would rather say."""

from __future__ import annotations

import time

from ftrun.evals import latency
from ftrun.evals.answer import GREEDY, generated
from tests.families import VOCAB, tiny_model, tiny_tokenizer


def test_a_model_that_would_stop_at_once_generates_as_many_tokens() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.eos_token_id = list(range(4, VOCAB - 1))
    assert generated(model, tokenizer, [[1, 9]], 6, **GREEDY).shape == (1, 1)
    assert generated(model, tokenizer, [[1, 9]], 6, min_new_tokens=6, **GREEDY).shape == (1, 6)
    assert latency.milliseconds(model, tokenizer, [1, 9], 6) > 0


def test_it_is_the_time_of_a_token() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    latency.milliseconds(model, tokenizer, [1, 9], 2)
    started = time.perf_counter()
    found = latency.milliseconds(model, tokenizer, [1, 9], 20)
    wall = time.perf_counter() - started
    assert 0 < found * 20 * latency.ROUNDS <= wall * 1e3
    assert not model.training
