"""What holds for every method, on every family where it can be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ftrun.errors import UserError
from ftrun.methods.base import wrappers
from ftrun.methods.files import load_adapter, save_adapter
from ftrun.models.select import anatomy
from tests.families import FAMILIES, tiny, tiny_model
from tests.methods.tuned import IDS, MERGING, METHODS, far, logits, prompted, shake, tuned, tuner_of

KERNELS = ("fast", "reference")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", METHODS)
def test_step_zero_is_the_base_exactly(kind: str, family: str) -> None:
    t = tuned(family, kind)
    if kind == "lora" and family in ("mixtral", "qwen3_moe"):
        # the experts run by another product than before, whose sums round otherwise
        assert far(logits(t.model), t.before) < 1e-6
        with t.tuner.disabled(t.model):
            t.before = logits(t.model)
    assert torch.equal(logits(t.model), t.before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_step_zero_of_the_reference_kernels_is_the_base_exactly(kind: str, family: str) -> None:
    t = tuned(family, kind, kernels="reference")
    assert torch.equal(logits(t.model), t.before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", METHODS)
def test_only_what_is_declared_trains_and_all_of_it_does(kind: str, family: str) -> None:
    t = tuned(family, kind)
    shake(t)
    t.model.train()
    t.model(prompted(t)).logits.float().square().mean().backward()
    declared = {id(p) for group in t.tuner.groups(t.model).values() for p in group}
    for name, p in t.model.named_parameters():
        assert p.requires_grad == (id(p) in declared), name
        assert (p.grad is not None) == (id(p) in declared), name
    dead = [n for n, p in t.model.named_parameters() if p.grad is not None and not p.grad.any()]
    # a key's bias shifts all scores of a row alike; a linear rope table has none; experts that no token took
    assert not [n for n in dead if not n.endswith(("k_proj.bias", "k_norm.bias")) and "expert" not in n], dead


@pytest.mark.parametrize("kind", [k for k in METHODS if k != "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral", "gemma3_text"])
def test_saved_and_loaded_it_gives_the_same_logits(kind: str, family: str, tmp_path: Path) -> None:
    t = tuned(family, kind)
    shake(t)
    save_adapter(tmp_path, t.tuner.adapter_config(t.anatomy, "base"), t.tuner.state(t.model))
    again = tuned(family, kind)
    assert far(logits(again.model, prompted(t)), logits(t.model, prompted(t))) > 1e-3
    config, tensors = load_adapter(tmp_path)
    again.tuner.check(config)
    again.tuner.load_state(again.model, tensors)
    assert torch.equal(logits(again.model, prompted(t)), logits(t.model, prompted(t)))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_unmerged(family: str, kind: str, kernels: str) -> None:
    t = tuned(family, kind, kernels=kernels)
    shake(t)
    own = {name: (p, p.clone()) for name, p in t.model.named_parameters()}
    apart = logits(t.model)
    assert far(apart, t.before) > 1e-2
    t.tuner.merge(t.model)
    assert not list(wrappers(t.model))
    assert far(logits(t.model), apart) < 1e-5
    t.tuner.unmerge(t.model)
    assert torch.equal(logits(t.model), apart)
    for name, p in t.model.named_parameters():
        assert p is own[name][0], name
        assert torch.equal(p, own[name][1]), name


@pytest.mark.parametrize(
    "options", [{"rslora": True}, {"targets": ["all", "embeddings", "head"]}, {"modules_to_save": ["embeddings"]}]
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2"])
def test_merged_is_unmerged_with_ends_and_rslora(family: str, options: dict) -> None:
    t = tuned(family, "lora", **options)
    shake(t)
    apart, tied = logits(t.model), t.model.config.tie_word_embeddings
    t.tuner.merge(t.model)
    assert far(logits(t.model), apart) < 1e-5
    assert t.model.config.tie_word_embeddings == (tied and "targets" not in options)
    if t.model.config.tie_word_embeddings:
        assert t.model.get_input_embeddings().weight is t.model.get_output_embeddings().weight
    t.tuner.unmerge(t.model)
    assert torch.equal(logits(t.model), apart)
    shake(t)
    apart = logits(t.model)
    t.tuner.merge(t.model)
    assert far(logits(t.model), apart) < 1e-5
    t.tuner.unmerge(t.model)
    assert t.model.config.tie_word_embeddings == tied


@pytest.mark.parametrize("kind", [k for k in METHODS if k not in MERGING])
def test_what_does_not_merge_says_why(kind: str) -> None:
    t = tuned("llama", kind)
    with pytest.raises(UserError, match=f"method={kind}: cannot be merged: .+"):
        t.tuner.merge(t.model)


@pytest.mark.parametrize("kind", [k for k in METHODS if k != "full"])
def test_the_base_can_be_had_back_for_a_while(kind: str) -> None:
    t = tuned("llama", kind)
    shake(t)
    with_it = logits(t.model, prompted(t))
    with t.tuner.disabled(t.model):
        assert torch.equal(logits(t.model), t.before)
    assert torch.equal(logits(t.model, prompted(t)), with_it)


@pytest.mark.parametrize("kind", METHODS)
def test_the_start_depends_on_seed_and_name_alone(kind: str) -> None:
    first, second, other = tuned("llama", kind), tuned("llama", kind), tuned("llama", kind)
    other.tuner.initialise(other.model, 1)
    states = [t.tuner.state(t.model) for t in (first, second, other)]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    if kind != "full":
        assert any(not torch.equal(states[0][n], states[2][n]) for n in states[0])
    if kind == "lora":
        fewer = tuned("llama", kind, layers="last:1", targets="qv")
        drawn = fewer.tuner.state(fewer.model)
        assert all(torch.equal(drawn[n], states[0][n]) for n in drawn)
        a = [v for n, v in states[0].items() if "lora_A" in n and v.shape[1] == 64]
        assert not torch.equal(a[0], a[1])


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_it_goes_on_without_values(kind: str, family: str) -> None:
    """Attached on the meta device, and a whole step on fake tensors; the same tensors train as in a real model."""
    from transformers import AutoModelForCausalLM

    real = tuned(family, kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny(family))
    tuner = tuner_of(kind)
    tuner.attach(model, anatomy(model, "all", "all"))
    tuner.initialise(model, 0)
    shapes = {n: (t.shape, t.dtype) for n, t in tuner.state(model).items()}
    assert shapes == {n: (t.shape, t.dtype) for n, t in real.tuner.state(real.model).items()}
    assert all(p.is_meta for p in model.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(tiny(family))
        tuner = tuner_of(kind)
        tuner.attach(model, anatomy(model, "all", "all"))
        tuner.initialise(model, 0)
        ids = torch.zeros(prompted(real).shape, dtype=torch.int64)
        model.train()
        model(ids).logits.sum().backward()
    assert all(p.grad is not None for group in tuner.groups(model).values() for p in group)


@pytest.mark.parametrize("kind", METHODS)
def test_checkpointed_layers_give_the_same_gradients(kind: str) -> None:
    found = []
    for wrap in (False, True):
        t = tuned("llama", kind, **({"dropout": 0.3} if kind in ("lora", "dora") else {}))
        shake(t)
        t.model.train()
        if wrap:
            for layer in t.model.model.layers:
                plain = layer.forward
                layer.forward = lambda *a, f=plain, **k: checkpoint(f, *a, use_reentrant=False, **k)
        torch.manual_seed(5)
        t.model(prompted(t)).logits.square().mean().backward()
        found.append([p.grad for group in t.tuner.groups(t.model).values() for p in group])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("kind", ["lora", "dora", "houlsby", "prompt"])
def test_over_a_bfloat16_base_it_trains_in_float32(kind: str) -> None:
    t = tuned("llama", kind, base=tiny_model("llama").bfloat16())
    assert torch.equal(logits(t.model), t.before)
    assert t.before.dtype == torch.bfloat16
    shake(t)
    t.model(prompted(t)).logits.float().square().mean().backward()
    for group in t.tuner.groups(t.model).values():
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in group)


def test_a_file_that_does_not_fit_is_refused_by_name() -> None:
    t = tuned("llama", "lora")
    state = t.tuner.state(t.model)
    for changes, message in (
        ({"targets": "qv"}, "no module takes the tensor '.*k_proj.*'; nearest: '.*[qv]_proj"),
        ({"rank": 8}, r"has the shape \(4, 64\), expected \(8, 64\)"),
    ):
        other = tuned("llama", "lora", **changes)
        with pytest.raises(UserError, match=message):
            other.tuner.load_state(other.model, state)
    first = next(iter(state))
    with pytest.raises(UserError, match=f"holds no tensor '{first}'; nearest"):
        t.tuner.load_state(t.model, {n: v for n, v in state.items() if n != first})


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_both_kernels_give_the_same_step(kind: str, kernels: str) -> None:
    t, plain = tuned("gpt2", kind, kernels=kernels), tuned("gpt2", kind, kernels="reference")
    for one in (t, plain):
        shake(one)
        one.model(IDS).logits.square().mean().backward()
    grads = [[p.grad for g in one.tuner.groups(one.model).values() for p in g] for one in (t, plain)]
    for quick, slow in zip(*grads, strict=True):
        assert (quick - slow).norm() <= 1e-5 * slow.norm()


def test_dropout_rests_in_a_resting_model() -> None:
    t = tuned("llama", "lora", dropout=0.5)
    shake(t)
    assert torch.equal(logits(t.model), logits(t.model))
    t.model.train()
    assert not torch.equal(logits(t.model), logits(t.model))


def test_a_module_is_not_trained_twice() -> None:
    with pytest.raises(UserError, match="lm_head is selected by targets too"):
        tuned("llama", "lora", targets=["all", "lm_head"], modules_to_save=["head"])


def test_a_wrapper_passes_its_base_on() -> None:
    layer = next(iter(wrappers(tuned("gpt2", "lora").model)))
    assert layer.weight is layer.base.weight
    assert isinstance(layer.bias, nn.Parameter)
