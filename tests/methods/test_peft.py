"""Against the referee, PEFT: the same logits, the same losses, each reads the other's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from ftrun.methods.files import load_adapter, save_adapter
from tests.families import tiny_model
from tests.methods.tuned import Tuned, far, logits, losses, prompted, shake, tuned

# name -> family, method, options, what PEFT's own config says for the same
_PATTERNS = {"rank_pattern": {"last:1": 2, "mlp.down_proj": 6}, "alpha_pattern": {r"layers\.0\..*q_proj": 4.0}}
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_ENDS = {"targets": ["qv", "embeddings", "head"]}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "lora", {}),
    "rslora": ("llama", "lora", {"rslora": True}),
    "gaussian": ("llama", "lora", {"init": "gaussian", "alpha": 7.5}),
    "dora": ("llama", "dora", {}),
    "dora-rslora": ("llama", "dora", {"rslora": True, "alpha": 8}),
    "conv1d": ("gpt2", "lora", {}),
    "conv1d-dora": ("gpt2", "dora", {}),
    "fused": ("phi3", "lora", {}),
    "fused-dora": ("gpt_neox", "dora", {}),
    "patterns": ("llama", "lora", _PATTERNS),
    "patterns-dora": ("llama", "dora", _PATTERNS),
    "layers": ("llama", "lora", {"layers": "last:1", "targets": "attention"}),
    "ends": ("llama", "lora", _ENDS),
    "ends-tied": ("qwen2", "lora", _ENDS),
    "ends-scaled": ("gemma3_text", "lora", _ENDS),
    "kept": ("llama", "lora", {"modules_to_save": ["embeddings", "head"]}),
    "kept-head": ("llama", "dora", {"modules_to_save": ["head"]}),
    "kept-tied": ("qwen2", "lora", {"modules_to_save": ["embeddings"]}),
    "kept-tied-conv1d": ("gpt2", "lora", {"modules_to_save": ["head"]}),
    "kept-scaled": ("gemma3_text", "lora", {"modules_to_save": ["embeddings"]}),
    "experts": ("mixtral", "lora", {}),
    "experts-down": ("qwen3_moe", "lora", {"targets": "down_proj"}),
    "prompt": ("llama", "prompt", {}),
    "prompt-positions": ("gpt2", "prompt", {}),
}


def ours(case: str) -> Tuned:
    family, kind, options = CASES[case]
    return tuned(family, kind, **options)


def theirs(t: Tuned, folder: Path) -> nn.Module:
    """The tiny base in PEFT with the adapter that `t` has now, by way of its file."""
    save_adapter(folder, t.tuner.adapter_config(t.anatomy, ""), t.tuner.state(t.model))
    base = tiny_model(t.model.config.model_type)
    # PEFT loads a prompt frozen or not at all
    model = peft.PeftModel.from_pretrained(base, folder, is_trainable=not t.tuner.prefix).eval()
    if t.tuner.prefix:
        model.prompt_encoder.requires_grad_(True)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("case", CASES)
def test_our_adapter_loads_in_peft_with_the_same_logits(case: str, tmp_path: Path) -> None:
    t = ours(case)
    shake(t)
    referee = theirs(t, tmp_path)
    assert far(logits(t.model, prompted(t)), logits(referee)) < 1e-5
    assert far(logits(referee), t.before if not t.tuner.prefix else t.before[:, :1]) > 1e-3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.few(8)
def test_the_losses_of_ten_steps_are_the_same(case: str, tmp_path: Path) -> None:
    t = ours(case)
    referee = theirs(t, tmp_path)
    own = trained(t.model)
    assert sum(p.numel() for p in own) == sum(p.numel() for p in trained(referee))
    virtual = prompted(t)
    model = (lambda ids: t.model(virtual)) if t.tuner.prefix else t.model
    found = losses(model, own, skip=t.tuner.prefix)
    expected = losses(referee, trained(referee), skip=t.tuner.prefix)
    assert found[-1] < found[0] - 0.02
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_pefts_adapter_loads_here_with_the_same_logits(case: str, tmp_path: Path) -> None:
    t = ours(case)
    config = dict(t.tuner.adapter_config(t.anatomy, ""), inference_mode=False)
    made = peft.get_peft_model(tiny_model(t.model.config.model_type), peft.PeftConfig.from_peft_type(**config)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in trained(made):
            p.add_(torch.randn(p.shape, generator=generator) * 0.03)
    made.save_pretrained(tmp_path)
    found, tensors = load_adapter(tmp_path)
    t.tuner.check(found)
    t.tuner.load_state(t.model, tensors)
    assert far(logits(t.model, prompted(t)), logits(made)) < 1e-5


def test_the_config_names_short_targets_where_they_are_exact() -> None:
    assert ours("lora").tuner.adapter_config(ours("lora").anatomy, "")["target_modules"] == sorted(_ALL)
    names = ours("layers").tuner.adapter_config(ours("layers").anatomy, "")["target_modules"]
    assert names == [f"model.layers.1.self_attn.{leaf}" for leaf in ("k_proj", "o_proj", "q_proj", "v_proj")]


def test_merged_here_is_merged_in_peft(tmp_path: Path) -> None:
    for case in ("rslora", "dora", "conv1d-dora", "experts"):
        t = ours(case)
        shake(t)
        merged = theirs(t, tmp_path / case).merge_and_unload()
        t.tuner.merge(t.model)
        assert far(logits(t.model), logits(merged)) < 1e-5, case
        assert t.model.lm_head.weight.shape == merged.lm_head.weight.shape
