"""Adapters of several methods, ranks and places in one batch: each row as with its adapter alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from ftrun.errors import UserError
from ftrun.evals.generation import answers
from ftrun.methods.mixed import Adapter, Mix
from ftrun.models.quant.base import QuantisedLinear
from ftrun.models.select import anatomy
from tests.families import tiny_model, tiny_tokenizer
from tests.methods.tuned import METHODS, far, shake, tuned, tuner_of

Case = tuple[str, dict[str, Any]]
_FIRST: Case = ("lora", {"rank": 4})
CASES: dict[str, tuple[str, list[Case]]] = {
    "three-lora": (
        "llama",
        [_FIRST, ("lora", {"rank": 7, "targets": "qv"}), ("lora", {"rank": 2, "layers": "last:1"})],
    ),
    "methods": ("llama", [_FIRST, ("dora", {}), ("houlsby", {}), ("prompt", {})]),
    "prompts": ("llama", [("prompt", {}), ("prompt", {"tokens": 2}), ("lora", {"targets": ["embeddings", "head"]})]),
    "parallel": ("qwen2", [("houlsby", {"placement": "parallel"}), _FIRST, ("dora", {"targets": "mlp"})]),
    "conv1d": ("gpt2", [_FIRST, ("dora", {}), ("houlsby", {})]),
    "flattened": ("opt", [_FIRST, ("dora", {}), ("houlsby", {})]),
    "kept": ("llama", [_FIRST, ("lora", {"modules_to_save": ["embeddings", "head"]}), ("prompt", {})]),
    "kept-tied": ("qwen2", [("lora", {"modules_to_save": ["embeddings"]}), _FIRST]),
    "scaled": ("gemma3_text", [("lora", {"targets": ["qv", "embeddings"]}), ("lora", {"modules_to_save": ["head"]})]),
    "experts": (
        "mixtral",
        [_FIRST, ("lora", {"rank": 3, "targets": "down_proj"}), ("houlsby", {"placement": "parallel"})],
    ),
    "experts-and-others": ("qwen3_moe", [_FIRST, ("dora", {}), ("houlsby", {"placement": "parallel"})]),
}
PROMPTS = [
    torch.randint(5, 260, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 4, 12, 7, 5, 9)
]


def alone(family: str, case: Case, seed: int) -> Any:
    kind, options = case
    t = tuned(family, kind, **{**METHODS[kind], **options})
    shake(t, seed)
    return t


def mixed(family: str, cases: list[Case]) -> tuple[Mix, list[Any]]:
    singles = [alone(family, case, seed) for seed, case in enumerate(cases)]
    model, adapters = tiny_model(family), []
    for i, ((kind, options), t) in enumerate(zip(cases, singles, strict=True)):
        tuner = tuner_of(kind, **{**METHODS[kind], **options})
        adapter = Adapter(f"a{i}", tuner, model, t.anatomy, "fast")
        adapter.load(t.tuner.adapter_config(t.anatomy, ""), t.tuner.state(t.model))
        adapters.append(adapter)
    return Mix(model, adapters), singles


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def rows_of(mix: Mix, names: list[str | None]) -> list[list[int]]:
    first = mix.model.get_input_embeddings().weight.shape[0]
    return [[*range(first, first + mix.prefix(name)), *prompt] for name, prompt in zip(names, PROMPTS, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_rows_of_several_adapters_equal_each_alone(case: str) -> None:
    family, cases = CASES[case]
    mix, singles = mixed(family, cases)
    known: list[str | None] = [*(f"a{i}" for i in range(len(cases))), None]
    base = tiny_model(family)
    models = {**{f"a{i}": t.model for i, t in enumerate(singles)}, None: base}
    scattered = list(itertools.islice(itertools.cycle(known), 6))
    ordered = sorted(scattered, key=str)
    for names in (scattered, ordered, [known[0]] * 6, [None] * 6):
        rows = rows_of(mix, names)
        mix.assign(names)
        with torch.no_grad():
            found = mix.model(**padded(rows)).logits[:, -1]
            for name, row, logits in zip(names, rows, found, strict=True):
                expected = models[name](torch.tensor([row])).logits[0, -1]
                assert far(logits, expected) < 1e-5
                if name is not None:
                    plain = base(torch.tensor([row[mix.prefix(name) :]])).logits[0, -1]
                    assert far(logits, plain) > 1e-4


def test_no_second_copy_of_the_base_and_one_product_for_all_rows() -> None:
    mix, singles = mixed("llama", [_FIRST, ("dora", {}), ("lora", {"rank": 2})])
    held = sum(p.numel() for p in mix.model.parameters())
    own = sum(p.numel() for t in singles for _, p in t.model.named_parameters() if p.requires_grad)
    assert held == sum(p.numel() for p in tiny_model("llama").parameters()) + own
    calls: list[int] = []
    layer = mix.model.model.layers[0].mlp.up_proj.base
    layer.register_forward_hook(lambda m, args, out: calls.append(args[0].shape[0]))
    names = ["a0", "a1", None, "a2", "a0", "a1"]
    mix.assign(names)
    with torch.no_grad():
        mix.model(**padded(rows_of(mix, names)))
    assert calls == [6]


def test_answers_of_a_mixed_batch_are_each_adapters_own() -> None:
    cases: list[Case] = [_FIRST, ("prompt", {}), ("houlsby", {})]
    mix, singles = mixed("llama", cases)
    mix.model.generation_config.eos_token_id = list(range(4, 270, 12))  # so that rows leave the batch on the way
    names: list[str | None] = ["a0", "a1", None, "a2", "a1", "a0"]
    rows = rows_of(mix, names)
    found = answers(mix.model, tiny_tokenizer(), rows, 20, meet=lambda left: mix.assign([names[i] for i in left]))
    assert len({len(a.ids) for a in found}) > 1
    models: dict[str | None, Any] = {f"a{i}": t.model for i, t in enumerate(singles)}
    models[None] = tiny_model("llama")
    for name, row, answer in zip(names, rows, found, strict=True):
        models[name].generation_config.eos_token_id = mix.model.generation_config.eos_token_id
        assert answer == answers(models[name], tiny_tokenizer(), [row], 20)[0]


def test_over_a_quantised_base() -> None:
    from ftrun.models.quant.nf4 import Options, Quantiser

    def quantised() -> Any:
        model, quantiser = tiny_model("llama", intermediate_size=128), Quantiser(Options())
        for name, module in list(model.named_modules()):
            if name.endswith("_proj"):
                made: QuantisedLinear = quantiser.empty(module)
                made.fill(module.weight.detach())
                model.set_submodule(name, made)
        return model

    singles = [tuned("llama", kind, base=quantised()) for kind in ("lora", "dora")]
    for seed, t in enumerate(singles):
        shake(t, seed)
    model, adapters = quantised(), []
    for name, t in zip("ab", singles, strict=True):
        adapter = Adapter(name, tuner_of(t.tuner.kind), model, t.anatomy, "fast")
        adapter.load(t.tuner.adapter_config(t.anatomy, ""), t.tuner.state(t.model))
        adapters.append(adapter)
    mix = Mix(model, adapters)
    mix.assign(["a", "b", "a"])
    ids = torch.tensor([PROMPTS[0], PROMPTS[0], PROMPTS[5]])
    with torch.no_grad():
        found = model(ids).logits
        assert far(found[1], singles[1].model(ids[1:2]).logits[0]) < 1e-5
        assert far(found[::2], singles[0].model(ids[::2]).logits) < 1e-5


def test_what_cannot_be_mixed_is_said() -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match="math is of method=full, which trains the base's own weights"):
        Adapter("math", tuner_of("full"), model, anatomy(model, "all", "all"), "fast")
    mix, _ = mixed("llama", [_FIRST, ("lora", {})])
    with pytest.raises(UserError, match=r"the adapter 'a3' is unknown\. Did you mean 'a[01]'"):
        mix.assign(["a0", "a3"])


@pytest.mark.parametrize("kind", ["lora", "dora", "houlsby", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_settled_values_give_the_same_logits(kind: str, family: str) -> None:
    t = alone(family, (kind, {}), 1)
    ids = torch.tensor([rows_of_one(t)])
    with torch.no_grad():
        expected = t.model(ids).logits
        with t.tuner.settled(t.model):
            twice = [t.model(ids).logits for _ in range(2)]
        assert far(twice[0], expected) < 1e-5
        assert torch.equal(*twice)
        shake(t, 7)  # and what was derived from the values is forgotten
        changed = t.model(ids).logits
        with t.tuner.settled(t.model):
            assert far(t.model(ids).logits, changed) < 1e-5
        assert far(changed, expected) > 1e-4


def rows_of_one(t: Any) -> list[int]:
    first = t.model.get_input_embeddings().weight.shape[0]
    return [*range(first, first + t.tuner.prefix), *PROMPTS[0]]
