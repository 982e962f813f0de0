"""Targets and layers, in every family."""

from __future__ import annotations

import pytest
import torch

from ftrun.errors import UserError
from ftrun.kernels.experts import ExpertsLinear, group_experts
from ftrun.models.select import anatomy, describe, spans
from tests.families import FAMILIES, tiny_model

# family -> where the layers are, attention's layers (q and v, or the fused one, first), the feed-forward's
_LLAMA = ("model.layers", ["q_proj", "v_proj", "k_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"])
_EXPERTS = ("model.layers", _LLAMA[1], ["experts.gate_up_proj", "experts.down_proj"])
NAMES = {
    **dict.fromkeys(FAMILIES, _LLAMA),
    "phi3": ("model.layers", ["qkv_proj", "o_proj"], ["gate_up_proj", "down_proj"]),
    "phi": ("model.layers", ["q_proj", "v_proj", "k_proj", "dense"], ["fc1", "fc2"]),
    "gpt2": ("transformer.h", ["c_attn", "c_proj"], ["c_fc", "c_proj"]),
    "gpt_neox": ("gpt_neox.layers", ["query_key_value", "dense"], ["dense_h_to_4h", "dense_4h_to_h"]),
    "opt": ("model.decoder.layers", ["q_proj", "v_proj", "k_proj", "out_proj"], ["fc1", "fc2"]),
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
}
PLACES = {"gpt2": ("attn", "mlp"), "gpt_neox": ("attention", "mlp"), "opt": ("self_attn", "")}
TIED = {"qwen2", "gemma2", "gemma3_text", "smollm3", "gpt2", "opt"}


def expected(family: str, layers: range, attention: list[str], mlp: list[str]) -> set[str]:
    stem = NAMES[family][0]
    ours, theirs = PLACES.get(family, ("self_attn", "mlp"))
    paths = [f"{ours}.{n}" for n in attention] + [f"{theirs}.{n}" if theirs else n for n in mlp]
    return {f"{stem}.{i}.{path}" for i in layers for path in paths}


def names(model: torch.nn.Module, targets: object, layers: object, experts: bool = True) -> set[str]:
    return {s.name for s in anatomy(model, targets, layers, experts).sites}  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_keyword_in_every_family(family: str) -> None:
    model = tiny_model(family, 3)
    _, attention, mlp = NAMES[family]
    outside = {"model.decoder.project_in", "model.decoder.project_out"} if family == "opt" else set()
    assert names(model, "all", "all") == expected(family, range(3), attention, mlp) | outside
    assert names(model, "all", "last:2") == expected(family, range(1, 3), attention, mlp)
    assert names(model, "attention", "0-1") == expected(family, range(2), attention, [])
    assert names(model, "mlp", "first:1") == expected(family, range(1), [], mlp)
    assert names(model, "qv", "every:2") == expected(
        family, range(0, 3, 2), attention[: 1 + (attention[1] == "v_proj")], []
    )
    assert names(model, [attention[0]], [1]) == expected(family, range(1, 2), attention[:1], [])
    assert names(model, r"re:.*\.0\..*" + mlp[-1].replace(".", r"\."), "all") >= expected(
        family, range(1), [], mlp[-1:]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_ends_and_sizes(family: str) -> None:
    model = tiny_model(family, 2)
    parts = anatomy(model, ["all", "embeddings", "head"], "all")
    assert (parts.depth, parts.width, parts.tied) == (2, 64, family in TIED)
    assert parts.sites[0].role == "embeddings"
    assert parts.sites[-1].role == "head"
    assert model.get_submodule(parts.head) is model.get_output_embeddings()
    assert model.get_submodule(parts.embeddings) is model.get_input_embeddings()
    for site in parts.sites:
        if not site.role.startswith("experts"):
            weight = model.get_submodule(site.name).weight
            turned = site.role == "embeddings" or (family == "gpt2" and site.role != "head")
            assert tuple(weight.shape) == (
                (site.in_features, site.out_features) if turned else (site.out_features, site.in_features)
            )
    width = {s.name: s.out_features for s in parts.sites}
    for block in parts.blocks:
        assert width[block.attention_out] == 64
        assert block.ffn_out is None or width[block.ffn_out] == 64
        assert (block.ffn_out is None) == (family in ("mixtral", "qwen3_moe"))
        assert (block.ffn is None) == (family == "opt")
        # what the sublayers say they end is what they end: width in, width out
        assert block.ffn is None or model.get_submodule(block.ffn)(torch.zeros(1, 3, 64)).shape == (1, 3, 64)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_on_request_and_after_grouping(family: str) -> None:
    model = tiny_model(family, 2)
    plain = anatomy(model, "all", "all")
    assert {s.role for s in plain.sites} >= {"experts_gate_up", "experts_down"}
    assert not {s.role for s in anatomy(model, "all", "all", experts=False).sites} & {"experts_gate_up", "experts_down"}
    assert names(model, "experts", "all") == expected(family, range(2), [], NAMES[family][2])
    with pytest.raises(UserError, match="targets=gate_up_proj: means the experts"):
        anatomy(model, "gate_up_proj", "all", experts=False)
    with pytest.raises(UserError, match="targets=mlp"):
        anatomy(model, "mlp", "all", experts=False)
    for module in list(model.modules()):
        if type(module).__name__.endswith("Experts"):
            group_experts(module, lambda _, weight: ExpertsLinear(weight))
    assert anatomy(model, "all", "all") == plain


def test_mixed_layers_say_where_a_name_is() -> None:
    model = tiny_model("qwen3_moe", 3, mlp_only_layers=[1])
    assert names(model, "up_proj", "all") == {"model.layers.1.mlp.up_proj"}
    with pytest.raises(UserError, match="matches nothing in layers 0,2; it is in layers 1"):
        anatomy(model, "up_proj", [0, 2])


def test_a_family_that_no_table_knows() -> None:
    from transformers import AutoModelForCausalLM, FalconConfig

    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, alibi=False)
    parts = anatomy(AutoModelForCausalLM.from_config(config), "all", "all")
    assert [s.role for s in parts.sites] == ["qkv", "o", "up", "down"] * 2
    assert parts.blocks[1].attention_out == "transformer.h.1.self_attention.dense"


@pytest.mark.parametrize(
    ("targets", "layers", "said"),
    [
        ("q_prj", "all", "Did you mean 'q_proj'?"),
        ("all", "40-50", "the model has 2 layers, 0 to 1"),
        (["q_proj", "c_attn"], "all", "targets=c_attn: matches nothing"),
        ("re:.*lm_head", "all", "routers, embeddings and head are not taken by a pattern"),
        ("re:q_proj", "all", "has to match the whole name, such as model.layers.0"),
        ("experts", "all", "targets=experts: matches nothing"),
        ("attn", "all", "Did you mean 'attention'?"),
    ],
)
def test_refused(targets: object, layers: object, said: str) -> None:
    with pytest.raises(UserError) as caught:
        anatomy(tiny_model("llama"), targets, layers)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_routers_are_taken_only_by_name() -> None:
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig

    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=2,
        num_experts_per_tok=1, decoder_sparse_step=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert "router" not in {s.role for s in anatomy(model, "all", "all").sites}
    with pytest.raises(UserError, match="routers, embeddings and head are not taken by a pattern"):
        anatomy(model, "re:.*shared_expert_gate", "all")
    assert names(model, "shared_expert_gate", "all") == {"model.layers.0.mlp.shared_expert_gate"}
    assert anatomy(model, "all", "all").blocks[0].ffn_out is None


def test_table_and_spans() -> None:
    rows = describe(anatomy(tiny_model("llama", 3), ["q_proj", "head"], [0, 1]))
    assert rows == [("0-1", "self_attn.q_proj", 2, 64, 64), ("-", "lm_head", 1, 64, 272)]
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert spans([]) == "-"


@pytest.mark.parametrize("targets", ["embeddings", ["embeddings", "head"]])
def test_layers_that_select_nothing_are_refused(targets: str | list[str]) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"layers=\[1\]: has no effect, as targets="):
        anatomy(model, targets, [1])
    assert anatomy(model, targets, "all").sites
    assert anatomy(model, ["embeddings", "q_proj"], [1]).sites
