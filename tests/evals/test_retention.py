"""The base's own text: sampled from its very distribution, seeded, ended where it ends; what is kept of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ftrun.evals import retention
from ftrun.evals.retention import Text
from tests.families import VOCAB, tiny_model, tiny_tokenizer

START = 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "opt"])
def test_a_seed_gives_its_text_and_leaves_the_generators_alone(family: str) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = retention.write(model, tokenizer, START, 5, 12, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(9)
    assert retention.write(model, tokenizer, START, 5, 12, seed=3) == first
    assert retention.write(model, tokenizer, START, 5, 12, seed=4) != first
    assert len(first) == 5
    assert len({tuple(row) for row in first}) == 5
    assert all(row[0] == START and 2 <= len(row) <= 13 for row in first)


def test_rows_end_with_their_first_end_token() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.eos_token_id = list(range(4, 100))  # so that most rows come to an end
    rows = retention.write(model, tokenizer, START, 20, 12, seed=0)
    ended = [row for row in rows if len(row) < 13]
    assert len(ended) > 10
    assert all(4 <= row[-1] < 100 for row in ended)
    assert not any(4 <= token < 100 for row in rows for token in row[1:-1])


def test_the_text_is_of_the_models_own_distribution() -> None:
    """Whatever its generation config says of how to sample."""
    model, tokenizer = tiny_model("llama", initializer_range=0.3), tiny_tokenizer()
    config = model.generation_config
    config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty = 0.1, 2, 0.3, 0.5, 5.0
    rows = 20_000
    found = torch.tensor([row[1] for row in retention.write(model, tokenizer, START, rows, 1, seed=0)])
    seen = torch.bincount(found, minlength=VOCAB) / rows
    with torch.no_grad():
        true = model(torch.tensor([[START]])).logits[0, -1].softmax(-1)
    # the expected distance of so many draws from their own distribution
    noise = float((2 / torch.pi * true * (1 - true) / rows).sqrt().sum()) / 2
    assert float((seen - true).abs().sum()) / 2 < 1.3 * noise


def test_a_text_starts_from_bos_else_from_eos() -> None:
    tokenizer = tiny_tokenizer()
    assert retention.start_of(tokenizer, VOCAB) == tokenizer.bos_token_id
    tokenizer.bos_token = None
    assert retention.start_of(tokenizer, VOCAB) == tokenizer.eos_token_id
    assert retention.start_of(tokenizer, 3) is None
    tokenizer.eos_token = None
    assert retention.start_of(tokenizer, VOCAB) is None


def test_what_is_kept_is_read_again_and_damage_is_seen() -> None:
    text = Text([[1, 7, 9], [1, 8]], 2.5, 3)
    kept = dataclasses.asdict(text)
    assert Text.read(kept, VOCAB) == text
    damaged = [None, [], {}, {**kept, "ids": []}, {**kept, "ids": [[1]]}, {**kept, "ids": [[1, "a"], [1, 8]]}]
    damaged += [{**kept, "ids": [[1, 7, VOCAB], [1, 8]]}, {**kept, "loss": None}, {**kept, "tokens": 4}]
    assert [Text.read(found, VOCAB) for found in damaged] == [None] * len(damaged)
