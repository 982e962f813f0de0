"""Prompts of unequal lengths in one batch: each as alone, and as transformers writes it; streamed whole."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ftrun.errors import UserError
from ftrun.evals import generation
from ftrun.evals.answer import GREEDY, generated
from ftrun.evals.generation import Chooser, Sampling, Written, answers, each_token, pieces, probabilities
from tests.families import FAMILIES, VOCAB, tiny_model, tiny_tokenizer
from tests.methods.tuned import shake, tuned

PROMPTS = [
    torch.randint(5, 260, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 21, 1, 8, 8, 30)
]


def ended(model: object, share: int = 3) -> object:
    """A model that ends an answer at every third token that it might say, so that rows end one after another."""
    model.generation_config.eos_token_id = list(range(4, VOCAB, share * 5))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_what_transformers_writes_for_each_prompt_alone(family: str) -> None:
    model, tokenizer = ended(tiny_model(family)), tiny_tokenizer()
    found = [[] for _ in PROMPTS]
    for row, token in each_token(model, tokenizer, PROMPTS, 24):
        found[row].append(token)
    alone = [generated(model, tokenizer, [prompt], 24, **GREEDY)[0].tolist() for prompt in PROMPTS]
    assert found == alone


def test_a_row_that_has_ended_leaves_the_batch() -> None:
    model, tokenizer = ended(tiny_model("llama")), tiny_tokenizer()
    sizes, met = [], []
    hook = model.model.layers[0].register_forward_hook(lambda m, args, out: sizes.append(args[0].shape[:2]))
    found = answers(model, tokenizer, PROMPTS, 40, meet=lambda rows: met.append(list(rows)))
    hook.remove()
    lengths = [len(a.ids) + a.ended for a in found]
    assert len(set(lengths)) > 2
    assert sizes[0] == (6, 30)
    assert [s[0] for s in sizes[1:]] == [sum(n > k for n in lengths) for k in range(1, max(lengths))]
    assert all(s[1] == 1 for s in sizes[1:])
    assert met[0] == list(range(6))
    assert len(met) == len({s[0] for s in sizes})
    assert [len(rows) for rows in met] == sorted((len(rows) for rows in met), reverse=True)


def test_virtual_tokens_stand_behind_the_padding() -> None:
    t = tuned("llama", "prompt")
    shake(t)
    first = t.model.get_input_embeddings().weight.shape[0]
    virtual = list(range(first, first + t.tuner.prefix))
    rows = [[*virtual, *prompt] for prompt in PROMPTS]
    together = answers(t.model, tiny_tokenizer(), rows, 12)
    assert [a.ids for a in together] == [answers(t.model, tiny_tokenizer(), [row], 12)[0].ids for row in rows]
    assert [a.ids for a in together] != [a.ids for a in answers(t.model, tiny_tokenizer(), PROMPTS, 12)]


def test_sampled_rows_do_not_hang_on_the_batch() -> None:
    model, tokenizer = ended(tiny_model("llama")), tiny_tokenizer()
    how = Sampling(temperature=1.3, top_p=0.9, top_k=40, seed=5)
    state = torch.get_rng_state()
    together = answers(model, tokenizer, PROMPTS, 12, how)
    assert torch.equal(torch.get_rng_state(), state)
    alone = [answers(model, tokenizer, [p], 12, how, numbers=[i])[0] for i, p in enumerate(PROMPTS)]
    assert together == alone
    assert together != answers(model, tokenizer, PROMPTS, 12, Sampling(1.3, 0.9, 40, seed=6))
    assert [a.ids for a in answers(model, tokenizer, PROMPTS, 12, Sampling(1.0, top_k=1))] == [
        a.ids for a in answers(model, tokenizer, PROMPTS, 12)
    ]


@pytest.mark.parametrize("how", [Sampling(0.7), Sampling(1.5, 0.8), Sampling(1.0, 1.0, 5), Sampling(0.9, 0.6, 7)])
def test_the_distribution_is_transformers(how: Sampling) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 2
    theirs = LogitsProcessorList([TemperatureLogitsWarper(how.temperature)])
    if how.top_k:
        theirs.append(TopKLogitsWarper(how.top_k))
    theirs.append(TopPLogitsWarper(how.top_p))
    expected = theirs(None, logits).softmax(-1)
    ours = probabilities(logits, how)
    assert torch.allclose(ours / ours.sum(-1, keepdim=True), expected, atol=1e-6)
    draws = 4000
    chooser = Chooser(how, [0])
    drawn = torch.cat([chooser(logits[:1], [0]) for _ in range(draws)])
    seen = torch.bincount(drawn, minlength=50) / draws
    assert not seen[expected[0] == 0].any()
    assert float((seen - expected[0]).abs().sum()) / 2 < 0.06


def test_pieces_are_the_answer_and_never_half_a_character() -> None:
    tokenizer = tiny_tokenizer()
    text = "où est le chat ? 猫は家にいる 🐈 ok"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    written = Written(tokenizer)
    found = [written.add(token) for token in ids]
    assert "".join(found) + written.rest() == text
    assert "\ufffd" not in "".join(found)
    assert "🐈" in found
    cut = Written(tokenizer)
    whole = "".join(cut.add(token) for token in tokenizer("a🐈", add_special_tokens=False).input_ids[:-1])
    assert (whole, cut.rest()) == ("a", "")


def test_streaming_gives_the_answers_text() -> None:
    model, tokenizer = ended(tiny_model("llama"), 9), tiny_tokenizer()
    for prompt in PROMPTS:
        streamed = "".join(pieces(model, tokenizer, prompt, 30))
        assert streamed.strip() == answers(model, tokenizer, [prompt], 30)[0].text
    assert not model.training


def test_the_model_is_left_as_it_was_where_a_reader_stops() -> None:
    model = tiny_model("llama").train()
    stream = pieces(model, tiny_tokenizer(), [5, 6], 30)
    next(stream)
    assert not model.training
    stream.close()
    assert model.training


def test_answers_end_with_the_table_of_positions() -> None:
    model = tiny_model("gpt2")
    model.table_of_positions = 256
    found = answers(model, tiny_tokenizer(), [[7] * 250, [9] * 3], 20)
    assert len(found[0].ids) <= 6 < len(found[1].ids)
    with pytest.raises(UserError, match="prompt 2: 256 tokens; the model has 256 positions"):
        answers(model, tiny_tokenizer(), [[7], [7] * 256], 20)
    with pytest.raises(UserError, match="prompt 1: holds no token"):
        answers(model, tiny_tokenizer(), [[]], 20)
    assert generation.answers(model, tiny_tokenizer(), [], 20) == []
