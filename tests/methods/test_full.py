"""Full fine-tuning: what trains, in which dtype, under autocast, and what stays tied."""

from __future__ import annotations

import pytest
import torch

from tests.families import tiny_model
from tests.methods.tuned import IDS, logits, shake, tuned


def names(t) -> set[str]:  # type: ignore[no-untyped-def]
    return {n for n, p in t.model.named_parameters() if p.requires_grad}


def test_everything_trains_by_default() -> None:
    t = tuned("llama", "full")
    assert names(t) == {n for n, _ in t.model.named_parameters()}
    assert {g: len(p) for g, p in t.tuner.groups(t.model).items()} == {"matrices": 16, "vectors": 5}


def test_layers_alone_train_whole_layers() -> None:
    t = tuned("llama", "full", layers="last:1")
    assert names(t) == {n for n, _ in t.model.named_parameters() if n.startswith("model.layers.1.")}


def test_targets_restrict_it_to_those_weights() -> None:
    t = tuned("gpt2", "full", targets=["attention", "head"])
    attention = {n for n, _ in t.model.named_parameters() if "attn.c_" in n}
    assert names(t) == attention | {"transformer.wte.weight"}
    t = tuned("mixtral", "full", targets="experts", layers="0")
    assert names(t) == {f"model.layers.0.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")}


def test_a_tied_weight_stays_one() -> None:
    t = tuned("qwen2", "full")
    assert t.model.lm_head.weight is t.model.model.embed_tokens.weight
    assert t.model.lm_head.weight.requires_grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masters_have_the_dtype_asked_for_and_run_under_autocast(dtype: str) -> None:
    t = tuned("llama", "full", base=tiny_model("llama").bfloat16(), dtype=dtype, layers="last:1")
    kinds = {p.dtype for group in t.tuner.groups(t.model).values() for p in group}
    assert kinds == {getattr(torch, dtype)}
    assert t.model.model.embed_tokens.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "float32"):
        t.model(IDS).logits.float().square().mean().backward()
    assert all(p.grad.dtype == p.dtype for group in t.tuner.groups(t.model).values() for p in group)


def test_its_state_is_the_models_and_loads_from_a_whole_model() -> None:
    t, again = tuned("llama", "full", layers="last:1"), tuned("llama", "full", layers="last:1")
    shake(t)
    assert set(t.tuner.state(t.model)) == names(t)
    again.tuner.load_state(again.model, t.model.state_dict())
    assert torch.equal(logits(again.model), logits(t.model))
    assert t.tuner.adapter_config(t.anatomy, "base") == {}


def test_the_base_is_gone() -> None:
    from ftrun.errors import UserError

    t = tuned("llama", "full")
    with pytest.raises(UserError, match="method=full: trains the base's own weights"), t.tuner.disabled(t.model):
        pass
