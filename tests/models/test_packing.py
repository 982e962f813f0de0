"""Families whose own code would mix packed rows, or show them the future, are refused; by what they do, not by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftrun.errors import UserError
from ftrun.models.base import open_base
from ftrun.models.forward import PACKED, TokenLoss, attention, register_attention
from ftrun.models.options import Options
from ftrun.models.packing import check_packing
from ftrun.models.skeleton import skeleton
from tests.families import FAMILIES, VOCAB, tiny_model, tiny_tokenizer
from tests.models.test_forward import packed, padded

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OLDER: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 64, "n_head": 4, "n_layer": 2, "hidden_size": 64}
KINDS = ["conv", "full_attention"]


def made(family: str, **facts: Any) -> Any:
    config = AutoConfig.for_model(family, **(facts or SIZES))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=PACKED).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_keep_rows_apart_pass(family: str) -> None:
    register_attention()
    model = tiny_model(family)
    model.set_attn_implementation(PACKED)
    check_packing(model)


@pytest.mark.parametrize("family", ["bloom", "codegen"])
def test_attention_of_their_own_is_refused(family: str) -> None:
    register_attention()
    facts = {**OLDER, "rotary_dim": 8} if family == "codegen" else OLDER
    with pytest.raises(UserError, match=rf"{family} cannot run on packed rows .*kernels=reference"):
        check_packing(made(family, **facts))


@pytest.mark.parametrize(
    ("family", "facts", "why"),
    [
        ("stablelm", SIZES, "where rows end"),  # it loses our arguments on the way
        ("nemotron", SIZES, "where rows end"),
        ("gpt_oss", {**SIZES, "head_dim": 16, "num_local_experts": 4}, "s_aux"),
        ("lfm2", {**SIZES, "layer_types": KINDS}, "where rows end"),
    ],
)
def test_what_the_forward_pass_does_counts(family: str, facts: dict[str, Any], why: str) -> None:
    register_attention()
    with pytest.raises(UserError, match=why):
        TokenLoss(made(family, **facts), "fast")(packed())
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **facts), dtype=torch.float32)
    assert torch.isfinite(TokenLoss(model, "reference")(padded()))


def test_a_kind_of_layer_that_no_one_knows_is_refused() -> None:
    register_attention()
    with pytest.raises(UserError, match="layers of the kind conv"):
        check_packing(made("lfm2", **SIZES, layer_types=KINDS))


@pytest.mark.parametrize("family", ["falcon", "gptj", "mamba"])
def test_a_skeleton_is_refused_in_words(family: str, tmp_path: Path) -> None:
    register_attention()
    facts = {"mamba": {**SIZES, "state_size": 4}, "gptj": {**OLDER, "rotary_dim": 8}}.get(family, SIZES)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **facts)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = open_base(Options(path=str(tmp_path)), "m", tmp_path / "cache", print)
    with pytest.raises(UserError, match="recurrent" if family == "mamba" else "kernels=reference"):
        skeleton(base, PACKED)
    if family != "mamba":
        skeleton(base)


def test_a_family_without_sdpa_answers_with_eager() -> None:
    register_attention()
    model = tiny_model("gemma2")
    model.set_attn_implementation(PACKED)
    with attention(model, "sdpa"):
        assert model.config._attn_implementation == "eager"
        model(torch.arange(5, 25)[None])
    assert model.config._attn_implementation == PACKED
