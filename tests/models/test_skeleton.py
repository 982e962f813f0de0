"""The model on the meta device: the published sizes, from YAML alone, and the switches of a skeleton."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ftrun.errors import UserError
from ftrun.models.base import Base, open_base
from ftrun.models.experts import GROUPED
from ftrun.models.options import Options
from ftrun.models.select import anatomy
from ftrun.models.skeleton import skeleton
from ftrun.schema import build, field_types
from tests.families import FAMILIES, edit_config, save_tiny, tiny_model

CONF = Path(__file__).parents[2] / "conf"
NAMED = sorted(p.stem for p in (CONF / "model").glob("*.yaml") if p.stem not in ("hub", "folder"))

# as published: the number of distinct parameters, tied ones counted once
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma2-2b": 2_614_341_888,
    "gemma2-27b": 27_227_128_320,
    "gemma3-1b": 999_885_952,
    "phi3-mini": 3_821_079_552,
    "phi4": 14_659_507_200,
    "phi2": 2_779_683_840,
    "olmo2-7b": 7_298_617_344,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "pythia-1.4b": 1_414_647_808,
    "pythia-12b": 11_846_072_320,
    "opt-350m": 331_196_416,
    "opt-13b": 12_853_473_280,
    "mixtral-8x7b": 46_702_792_704,
}


def composed(name: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base=None):
        return OmegaConf.to_container(compose(f"model/{name}").model, resolve=True)  # type: ignore[return-value]


def planned(name: str, cache: Path, **changes: Any) -> Base:
    return open_base(build(Options, {**composed(name), "source": "hub", **changes}, "model"), name, cache, print)


def tiny_base(family: str, tmp_path: Path, dtype: str = "float32", **changes: Any) -> Base:
    folder = save_tiny(family, tmp_path / family, **changes)
    return open_base(Options(path=str(folder), dtype=dtype), family, tmp_path / "cache", print)


@pytest.mark.parametrize("name", NAMED)
def test_a_yaml_alone_gives_the_published_size(name: str, tmp_path: Path) -> None:
    """The header's figure, the one known here, and the skeleton's agree; no file is at hand."""
    base = planned(name, tmp_path)
    assert base.folder is None
    assert base.files is None
    model = skeleton(base)
    count = sum(p.numel() for p in model.parameters())
    header = (CONF / "model" / f"{name}.yaml").read_text()
    said = re.search(r"([\d,]+) parameters, ([\d.]+) GB in bfloat16", header)
    assert said is not None
    assert count == int(said[1].replace(",", "")) == PUBLISHED.get(name, count)
    assert float(said[2]) == pytest.approx(2 * count / 1e9, rel=0.02)
    assert header.startswith(f"# ftrun model={name}\n")
    parts = anatomy(model, "all", "all")
    assert len(parts.blocks) == parts.depth
    assert base.options.license
    assert base.options.hub


def test_yamls_name_every_option() -> None:
    assert set(yaml.safe_load((CONF / "model/hub.yaml").read_text())) == set(field_types(Options))
    assert set(PUBLISHED) <= set(NAMED)


def test_partial_rotary_facts_take_effect(tmp_path: Path) -> None:
    """A fact that transformers does not read would leave no trace in the size: here it does in the frequencies."""
    for name, pairs in (("phi2", 16), ("phi1.5", 16), ("pythia-1b", 32), ("phi4", 64), ("qwen3-30b-a3b", 64)):
        buffers = dict(skeleton(planned(name, tmp_path)).named_buffers())
        assert next(b for n, b in buffers.items() if n.endswith("inv_freq")).shape == (pairs,), name


@pytest.mark.parametrize("family", FAMILIES)
def test_skeleton_is_the_saved_model_without_weights(family: str, tmp_path: Path) -> None:
    model = skeleton(tiny_base(family, tmp_path, "bfloat16"))
    real = tiny_model(family)
    shapes = {n: p.shape for n, p in real.named_parameters()}
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert model.config.use_cache is False
    tied = real.get_output_embeddings().weight is real.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "phi"])
def test_the_bases_own_dropout_is_off_in_training_too(family: str, tmp_path: Path) -> None:
    key = {"gpt2": "resid_pdrop", "opt": "dropout", "gpt_neox": "hidden_dropout", "phi": "embd_pdrop"}[family]
    base = tiny_base(family, tmp_path, **{key: 0.3})
    model = skeleton(base)
    assert getattr(base.config, key) == 0.3  # what is saved again is the base's own config
    model = model.to_empty(device="cpu")
    model.load_state_dict(tiny_model(family).state_dict(), strict=False)
    for buffer in model.buffers():
        buffer.zero_()
    ids = torch.arange(5, 25)[None]
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_run_grouped_as_transformers_own_do(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert skeleton(tiny_base(family, tmp_path)).config._experts_implementation == GROUPED
    experts = tiny_model(family).to(dtype).model.layers[0].mlp.experts
    x, index = torch.randn(12, 64, dtype=dtype, requires_grad=True), torch.stack([torch.randperm(4)[:2]] * 12)
    weights = torch.rand(12, 2, dtype=dtype)
    found = []
    for kind in (GROUPED, "batched_mm" if dtype == torch.float32 else "grouped_mm"):
        experts.config._experts_implementation = kind
        out = experts(x, index, weights)
        out.float().square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in experts.parameters())])
        x.grad = None
        experts.zero_grad()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_attention_is_handed_through(tmp_path: Path) -> None:
    assert skeleton(tiny_base("llama", tmp_path), "eager").config._attn_implementation == "eager"
    assert skeleton(tiny_base("gemma2", tmp_path)).config._attn_implementation == "eager"  # it has no sdpa
    with pytest.raises(UserError, match="cannot be built"):
        skeleton(tiny_base("qwen3", tmp_path), "no_such_attention")


def test_under_fake_tensors(tmp_path: Path) -> None:
    with FakeTensorMode():
        model = skeleton(planned("llama-7b", tmp_path))
    assert all(isinstance(p, FakeTensor) and p.is_meta for p in model.parameters())


def test_new_tokens_take_spare_rows_first(tmp_path: Path) -> None:
    """The tiny tokenizer has 261 tokens, the embedding 272 rows."""
    folder = save_tiny("llama", tmp_path / "m")
    for count, rows in ((3, 272), (11, 272), (12, 273)):
        options = Options(path=str(folder), new_tokens=[f"<new{i}>" for i in range(count)])
        base = open_base(options, "m", tmp_path, print)
        assert base.rows == rows
        assert base.tokenizer().convert_tokens_to_ids("<new0>") == 261
        model = skeleton(base)
        assert model.get_input_embeddings().weight.shape[0] == rows
        assert model.get_output_embeddings().weight.shape[0] == rows
    assert planned("llama-7b", tmp_path, new_tokens=["<a>", "<b>"]).rows == 32002  # no tokenizer at hand
    with pytest.raises(UserError, match="'<s>' is in the vocabulary already"):
        open_base(Options(path=str(folder), new_tokens=["<s>"]), "m", tmp_path, print).tokenizer()


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"hidden_act": "zip"}, "hidden_act=zip"),
        ({"rope_parameters": {"rope_type": "zip", "rope_theta": 1e4}}, "rope_type=zip"),
        ({"pad_token_id": 9999}, "[Pp]adding_idx"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
    ],
)
def test_facts_that_transformers_cannot_do_with(facts: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "m")
    edit_config(folder, **facts)
    with pytest.raises(UserError, match=rf"config\.json.*{said}"):
        skeleton(open_base(Options(path=str(folder)), "m", tmp_path, print))
