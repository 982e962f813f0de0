"""Prompt tuning: the sentinel ids, how the vectors start, rows that are packed."""

from __future__ import annotations

import pytest
import torch

from ftrun.errors import UserError
from ftrun.methods.base import wrappers
from ftrun.methods.prompt import Options
from tests.families import FAMILIES, tiny_model, tiny_tokenizer
from tests.methods.tuned import IDS, far, logits, prompted, shake, tuned


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_seen_in_every_family(family: str) -> None:
    t = tuned(family, "prompt")
    assert t.tuner.prefix == 5
    before = logits(t.model, prompted(t))
    shake(t)
    assert far(logits(t.model, prompted(t)), before) > 1e-4
    assert torch.equal(logits(t.model), t.before)


def test_vectors_of_tokens_do_what_the_tokens_do() -> None:
    t = tuned("llama", "prompt", init="text", text="abc")
    ids = tiny_tokenizer()("abc")["input_ids"]
    assert len(ids) == 3
    said = torch.tensor((ids * 2)[:5]).expand(len(IDS), -1)
    assert torch.equal(logits(t.model, prompted(t)), logits(tiny_model("llama"), torch.cat([said, IDS], 1)))


def test_a_longer_text_is_cut() -> None:
    t = tuned("llama", "prompt", init="text", text="abcdefgh")
    ids = tiny_tokenizer()("abcdefgh")["input_ids"][:5]
    vectors = next(iter(wrappers(t.model))).vectors
    assert torch.equal(vectors, tiny_model("llama").model.embed_tokens.weight[ids])


def test_a_vocabularys_start_takes_rows_of_the_embedding() -> None:
    t = tuned("llama", "prompt")
    rows, vectors = t.model.model.embed_tokens.weight, next(iter(wrappers(t.model))).vectors
    assert all((rows == v).all(1).any() for v in vectors)


def test_a_random_start_has_the_embeddings_spread() -> None:
    t = tuned("llama", "prompt", init="random", tokens=64)
    spread = float(t.model.model.embed_tokens.weight.std())
    assert float(next(iter(wrappers(t.model))).vectors.std()) == pytest.approx(spread, rel=0.1)


def test_a_scaled_embeddings_vectors_are_those_that_the_model_sees() -> None:
    t = tuned("gemma3_text", "prompt")
    with torch.no_grad():
        token = t.model.model.embed_tokens.base(IDS[0])
    assert float(next(iter(wrappers(t.model))).vectors.detach().std()) == pytest.approx(float(token.std()), rel=0.2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init": "text"}, "method.init=text: give the text"),
        ({"text": "abc"}, "method.text: has no effect with method.init=vocabulary"),
    ],
)
def test_a_text_goes_with_its_option_and_only_with_it(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Options(**values)


def test_a_text_needs_a_tokenizer() -> None:
    t = tuned("llama", "prompt", init="text", text="abc")
    with pytest.raises(UserError, match=r"method.init=text: this base has no tokenizer"):
        t.tuner.initialise(t.model, 0)
