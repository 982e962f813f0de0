"""LoRA adapters summed: by hand, and as PEFT does it; saved, PEFT loads the sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from ftrun.errors import UserError
from ftrun.methods import base
from ftrun.methods.blend import Blend, Factors, blend, truncated
from ftrun.methods.files import save_adapter
from ftrun.methods.mixed import Adapter, Mix
from tests.families import tiny_model
from tests.methods.tuned import METHODS, Tuned, far, logits, shake, tuned, tuner_of

WEIGHTS = {"a0": 0.7, "a1": -0.4, "a2": 1.5}
_SAME: list[dict[str, Any]] = [{"rank": 4}, {"rank": 3, "alpha": 5.0}, {"rank": 6, "rslora": True}]
_OTHER: list[dict[str, Any]] = [
    {"rank": 4, "targets": "qv", "layers": "last:1"},
    {"rank": 3, "rank_pattern": {"mlp.down_proj": 5}, "alpha_pattern": {"q_proj": 3.0}},
    {"rank": 2, "targets": ["mlp", "embeddings", "head"]},
]
_EXPERTS: list[dict[str, Any]] = [{"rank": 4, "targets": "down_proj"}, {"rank": 3}, {"rank": 2, "layers": "first:1"}]
CASES = {"llama": _SAME, "qwen2": _OTHER, "gpt2": _SAME, "mixtral": _EXPERTS}


def singles(family: str, options: list[dict[str, Any]], kind: str = "lora") -> list[Tuned]:
    found = [tuned(family, kind, **{**METHODS[kind], **one}) for one in options]
    for seed, t in enumerate(found):
        shake(t, seed)
    return found


def blended(family: str, options: list[dict[str, Any]], rank: int | None = None) -> tuple[Any, Blend, list[Tuned]]:
    found, model = singles(family, options), tiny_model(family)
    made = blend(model, adapters_of(model, found), WEIGHTS, rank)
    Mix(model, [made.adapter]).assign(["blend"] * 3)
    return model, made, found


def adapters_of(model: Any, found: list[Tuned]) -> list[Adapter]:
    made = []
    for i, t in enumerate(found):
        adapter = Adapter(f"a{i}", type(t.tuner)(t.tuner.options), model, t.anatomy, "fast")
        adapter.load(t.tuner.adapter_config(t.anatomy, ""), t.tuner.state(t.model))
        made.append(adapter)
    return made


def by_hand(found: list[Tuned]) -> dict[str, torch.Tensor]:
    """Σ wᵢ (Wᵢ − W) of each weight, from each adapter's merged one."""
    total: dict[str, torch.Tensor] = {}
    for weight, t in zip(WEIGHTS.values(), found, strict=True):
        for wrapper in base.wrappers(t.model):
            update = wrapper.scale * (wrapper.lora_B @ wrapper.lora_A)
            total[wrapper.name] = total.get(wrapper.name, 0) + weight * update.detach()
    return total


@pytest.mark.parametrize("family", CASES)
def test_the_sum_is_exact_and_peft_loads_it(family: str, tmp_path: Path) -> None:
    model, made, found = blended(family, CASES[family])
    assert made.kept == 1
    expected = by_hand(found)
    own = {w.name: w for w in base.wrappers(made.adapter.wrappers)}
    assert own.keys() == expected.keys()
    for name, update in expected.items():
        assert torch.allclose(own[name].scale * (own[name].lora_B @ own[name].lora_A), update, atol=1e-6)
    adapter = made.adapter
    config = adapter.tuner.adapter_config(adapter.anatomy, "")
    save_adapter(tmp_path, config, adapter.tuner.state(adapter.wrappers))
    referee = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert far(logits(model), logits(referee)) < 1e-5
    assert far(logits(model), found[0].before) > 1e-3


@pytest.mark.parametrize(("way", "rank"), [("cat", None), ("svd", 5)])
def test_it_is_what_peft_makes_of_them(way: str, rank: int | None, tmp_path: Path) -> None:
    model, made, found = blended("llama", _SAME, rank)
    referee = None
    for i, t in enumerate(found):
        folder = tmp_path / f"a{i}"
        save_adapter(folder, t.tuner.adapter_config(t.anatomy, ""), t.tuner.state(t.model))
        if referee is None:
            referee = peft.PeftModel.from_pretrained(tiny_model("llama"), folder, adapter_name="a0").eval()
        else:
            referee.load_adapter(folder, f"a{i}")
    more = {"svd_rank": rank} if rank else {}
    referee.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type=way, **more)
    referee.set_adapter("sum")
    assert far(logits(model), logits(referee)) < 1e-4
    assert made.rank == (rank or 13)
    assert (made.kept < 1) == (rank is not None)


def test_a_smaller_rank_is_the_best_there_is_and_says_what_it_keeps() -> None:
    _, made, found = blended("llama", _SAME, 5)
    kept = total = 0.0
    own = {w.name: w for w in base.wrappers(made.adapter.wrappers)}
    for name, update in by_hand(found).items():
        squares = torch.linalg.svdvals(update.double()).square()
        kept, total = kept + float(squares[:5].sum()), total + float(squares.sum())
        left = float((own[name].lora_B @ own[name].lora_A - update).double().square().sum())
        assert left == pytest.approx(float(squares[5:].sum()), rel=1e-3)
        assert own[name].lora_A.shape[0] == 5
    assert made.kept == pytest.approx(kept / total, rel=1e-5)
    assert 0.3 < made.kept < 0.999
    assert blended("llama", _SAME, 50)[1].kept == 1


def test_a_rank_deficient_update_keeps_all_of_it() -> None:
    a = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))  # two experts
    b = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(1))
    doubled = Factors(torch.cat([a, a], -2), torch.cat([b, 0.5 * b], -1))
    found, values = truncated(doubled, 3)
    assert torch.allclose(found.b @ found.a, 1.5 * b @ a, atol=1e-5)
    assert float(values[..., 3:].max()) < 1e-10


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("dora", {}, "math is of method=dora: it also sets the length"),
        ("houlsby", {}, "math is of method=houlsby: a nonlinearity"),
        ("prompt", {}, "math is of method=prompt: it is virtual tokens"),
        ("lora", {"modules_to_save": ["head"]}, "math holds lm_head in full"),
    ],
)
def test_what_is_more_than_an_update_is_refused(kind: str, options: dict[str, Any], said: str) -> None:
    t, model = tuned("llama", kind, **{**METHODS[kind], **options}), tiny_model("llama")
    adapter = Adapter("math", tuner_of(kind, **options), model, t.anatomy, "fast")
    with pytest.raises(UserError, match=said):
        blend(model, [adapter], {"math": 1.0}, None)
    with pytest.raises(UserError, match=r"the adapter 'maths' is unknown\. Did you mean 'math'"):
        blend(model, [adapter], {"maths": 1.0}, None)
