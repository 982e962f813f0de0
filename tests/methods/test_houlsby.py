"""Bottleneck adapters: where they stand, in every family."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ftrun.errors import UserError
from ftrun.methods.base import wrappers
from ftrun.methods.houlsby import Bottleneck, Options
from tests.families import FAMILIES, tiny_model
from tests.methods.tuned import IDS, far, logits, shake, tuned

PLACES = {
    "both": ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"],
    "ffn": ["model.layers.0.mlp.down_proj"],
    "parallel": ["model.layers.0.mlp"],
}


@pytest.mark.parametrize("placement", PLACES)
def test_they_stand_where_the_option_says(placement: str) -> None:
    t = tuned("llama", "houlsby", placement=placement, layers="0")
    assert [w.name for w in wrappers(t.model)] == PLACES[placement]


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_every_placement_or_says_why_not(family: str, placement: str) -> None:
    if family == "opt" and placement == "parallel":
        with pytest.raises(UserError, match=r"method.placement=parallel: .* no feed-forward module of its own"):
            tuned(family, "houlsby", placement=placement)
        return
    t = tuned(family, "houlsby", placement=placement)
    assert torch.equal(logits(t.model), t.before)
    shake(t)
    assert far(logits(t.model), t.before) > 1e-3
    t.model(IDS).logits.square().mean().backward()
    assert all(p.grad.any() for group in t.tuner.groups(t.model).values() for p in group)


def test_the_maths_is_the_papers() -> None:
    for placement in ("ffn", "parallel"):
        t = tuned("llama", "houlsby", placement=placement, activation="relu", layers="0")
        shake(t)
        layer = next(iter(wrappers(t.model)))
        x = torch.randn(2, 3, 64 if placement == "parallel" else 96)
        out = layer.base(x)
        h = x if placement == "parallel" else out
        expected = out + F.linear(torch.relu(F.linear(h, layer.down, layer.down_bias)), layer.up, layer.up_bias)
        assert torch.allclose(layer(x), expected, atol=1e-6)


def test_their_size_is_two_matrices_and_two_vectors() -> None:
    t = tuned("llama", "houlsby", bottleneck=8)
    count = sum(p.numel() for group in t.tuner.groups(t.model).values() for p in group)
    assert count == 2 * 2 * (2 * 64 * 8 + 64 + 8)


def test_over_a_bfloat16_base_the_product_is_in_bfloat16() -> None:
    t = tuned("llama", "houlsby", base=tiny_model("llama").bfloat16(), dtype="bfloat16")
    assert {p.dtype for group in t.tuner.groups(t.model).values() for p in group} == {torch.bfloat16}
    assert logits(t.model).dtype == torch.bfloat16


def test_a_router_beside_the_output_is_passed_on() -> None:
    class Sparse(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return super().forward(x), "scores"

    layer = Bottleneck("mlp", Sparse(8, 8), 8, Options(placement="parallel"))
    torch.nn.init.ones_(layer.up_bias)
    x = torch.randn(2, 8)
    out, scores = layer(x)
    assert scores == "scores"
    assert torch.allclose(out, layer.base(x)[0] + 1)
