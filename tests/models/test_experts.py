"""Experts: grouped products against transformers' own, plain and quantised, gradients, fake tensors, what is kept."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from ftrun.errors import UserError
from ftrun.kernels.dense import features, is_linear
from ftrun.kernels.experts import (
    ExpertsLinear,
    GroupedExperts,
    group_experts,
    grouped_mm,
    is_experts,
    ungroup_experts,
    why_not,
)
from ftrun.models.load import prepare
from ftrun.models.quant import int8, nf4
from ftrun.models.quant.base import QuantisedExperts, Quantiser
from tests.families import tiny, tiny_model

FAMILIES = ("mixtral", "qwen3_moe")
QUANTISERS = {"nf4": nf4.Quantiser(nf4.Options()), "int8": int8.Quantiser(int8.Options())}


def experts_of(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_model(family).to(dtype)
    model.set_experts_implementation("batched_mm" if dtype == torch.float32 else "grouped_mm")
    return model.model.layers[0].mlp.experts.requires_grad_(False)


def inputs(tokens: int = 12, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens)
    index = torch.stack([torch.randperm(3)[:2] for _ in range(tokens)])  # expert 3 gets nothing
    return torch.randn(tokens, 64, dtype=dtype, requires_grad=True), index, torch.rand(tokens, 2, dtype=dtype)


def plain(name: str, parameter: nn.Parameter) -> nn.Module:
    return ExpertsLinear(parameter)


def quantised(experts: nn.Module, quantiser: Quantiser) -> tuple[nn.Module, nn.Module]:
    """The experts quantised, and the dense ones that these stand for."""
    made, dense = copy.deepcopy(experts), copy.deepcopy(experts)
    quantiser.group(made)
    for name in ("gate_up_proj", "down_proj"):
        getattr(made, name).fill(getattr(experts, name))
        getattr(dense, name).data = getattr(made, name).dense()
    return made, dense


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_experts_are_transformers_own(family, dtype):
    experts = experts_of(family, dtype)
    grouped = group_experts(copy.deepcopy(experts), plain)
    x, index, weights = inputs(dtype=dtype)
    expected, found = experts(x, index, weights), grouped(x, index, weights)
    grad = torch.randn_like(expected)
    ours, theirs = torch.autograd.grad(found, x, grad)[0], torch.autograd.grad(expected, x, grad)[0]
    if dtype == torch.bfloat16:  # the same kernel on the same rows
        assert torch.equal(found, expected)
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert isinstance(grouped, type(experts))
    assert features(grouped.gate_up_proj) == (64, experts.gate_up_proj.shape[1])
    assert is_linear(grouped.down_proj)


def test_there_and_back():
    experts = experts_of("mixtral")
    names = set(experts.state_dict())
    back = ungroup_experts(group_experts(copy.deepcopy(experts), plain))
    assert set(back.state_dict()) == names
    assert type(back) is type(experts)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), experts.parameters(), strict=True))
    grouped, dense = quantised(experts, QUANTISERS["nf4"])
    assert torch.equal(ungroup_experts(grouped).down_proj, dense.down_proj)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantiser", QUANTISERS.values(), ids=QUANTISERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_experts_equal_their_dense_selves(family, quantiser, dtype):
    made, dense = quantised(experts_of(family, dtype), quantiser)
    x, index, weights = inputs(dtype=dtype)
    found, expected = made(x, index, weights), dense(x, index, weights)
    grad = torch.randn_like(found)
    ours, theirs = torch.autograd.grad(found, x, grad)[0], torch.autograd.grad(expected, x, grad)[0]
    tight = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found, expected, **tight)
    torch.testing.assert_close(ours, theirs, **tight)


def test_nothing_dense_is_kept_for_backward():
    made, _ = quantised(experts_of("mixtral"), QUANTISERS["nf4"])
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        made(*inputs())
    assert sizes
    assert not [s for s in sizes if len(s) == 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(64, 32), (64, 3)])
def test_the_product_has_gradients_for_both_and_knows_small_ranks(dtype, sizes):
    a, b = sizes
    x = torch.randn(10, a, dtype=dtype, requires_grad=True)
    matrices = torch.randn(4, a, b, dtype=dtype, requires_grad=True)
    offsets = torch.tensor([3, 3, 9, 10], dtype=torch.int32)
    expert = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 2, 3])
    found, expected = grouped_mm(x, matrices, offsets), torch.bmm(x.unsqueeze(1), matrices[expert]).squeeze(1)
    grad = torch.randn_like(found)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-1}
    torch.testing.assert_close(found, expected, **near)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, matrices), grad), torch.autograd.grad(expected, (x, matrices), grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_mixture_runs_on_fake_tensors_with_checkpointing(dtype):
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(tiny("mixtral"), dtype=dtype).requires_grad_(False)
        names = prepare(model, QUANTISERS["nf4"])
        x = torch.randn(1, 12, 64, dtype=dtype, requires_grad=True)
        block = model.model.layers[0].mlp
        assert isinstance(block.experts, GroupedExperts)
        assert isinstance(block.experts.gate_up_proj, QuantisedExperts)
        checkpoint(block, x, use_reentrant=False).float().sum().backward()
        assert x.grad is not None
    assert "model.layers.0.mlp.experts" in names
    assert "model.layers.0.self_attn.q_proj" in names
    assert not [name for name in names if name.endswith((".gate", "lm_head", "embed_tokens"))]


def test_experts_of_another_form_are_refused_by_name():
    model = tiny_model("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.is_transposed = True
    assert is_experts(experts)
    assert "transposed" in str(why_not(experts))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts cannot be quantised: .*quant\.skip=\[experts\]"):
        prepare(model, QUANTISERS["nf4"])
    left = tiny_model("mixtral")
    prepare(left, nf4.Quantiser(nf4.Options(skip=["experts"])))
    assert left.model.layers[1].mlp.experts.gate_up_proj.dim() == 3
