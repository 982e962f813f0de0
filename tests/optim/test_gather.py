"""Small parameters gathered: the same training, the same treatment of each, gradients and views where they belong."""

from __future__ import annotations

import importlib
import json
import weakref
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ftrun.optim.gather import Gathered, buckets, gather, size_of
from ftrun.optim.paging import PAGED_FROM
from ftrun.optim.state import flatten, restore
from tests.optim.choices import options

# of two layers and of none: matrices of whole blocks of 256, odd ones, vectors, one that is large enough alone
SHAPES = [
    (0, (64, 96)),
    (0, (96, 64)),
    (0, (5, 7)),
    (0, (40,)),
    (0, (17,)),
    (1, (64, 96)),
    (1, (4100,)),
    (None, (9, 3)),
]
SHAPES += [(1, (400, 256))]
BITSANDBYTES = ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion", "paged_lion_8bit"]


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(shape, generator=g) * 0.1).to(dtype)) for _, shape in SHAPES]


def gathered(name: str, params: list[nn.Parameter], below: int = PAGED_FROM) -> tuple[torch.optim.Optimizer, Gathered]:
    kind, made = options(name)
    place = {p: layer for p, (layer, _) in zip(params, SHAPES, strict=True)}
    vectors = [p for p in params if p.ndim < 2]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "lr": 1e-2, "weight_decay": 0.1},
        {"params": vectors, "lr": 1e-2, "weight_decay": 0.0},
    ]
    found, flats = gather(buckets(groups, place.get, below))
    return importlib.import_module(f"ftrun.optim.{kind}").build(found, made, "cpu"), flats


def advance(optimizer: torch.optim.Optimizer, flats: Gathered, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        g = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        flats.gather_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def sizes(groups: list[dict[str, Any]]) -> list[list[list[tuple[int, ...]]]]:
    return [[[tuple(p.shape) for p in bucket] for bucket in group["params"]] for group in groups]


def test_a_bucket_is_of_one_place_rate_decay_and_dtype() -> None:
    params = [nn.Parameter(torch.zeros(s)) for s in ((4, 8), (8, 4), (4, 8), (400, 256))]
    params.append(nn.Parameter(torch.zeros((4, 8), dtype=torch.bfloat16)))
    place = dict(zip(params, (0, 0, 1, 0, 0), strict=True))
    groups = [{"params": [p], "lr": 1e-3, "weight_decay": 0.0} for p in params]
    found = buckets(groups, place.get, PAGED_FROM)
    assert sizes(found) == [[[(4, 8), (8, 4)], [(4, 8)], [(400, 256)], [(4, 8)]]]
    groups[1]["lr"] = 16e-3
    assert sizes(buckets(groups, place.get, PAGED_FROM))[1] == [[(8, 4)]]


def test_vectors_keep_their_decay_and_their_float32_moments() -> None:
    params = weights()
    optimizer, flats = gathered("adamw_8bit", params)
    by_size = {g["params"][0].numel(): g for g in optimizer.param_groups}
    fine, wide = by_size[512], by_size[4100]
    assert (fine["weight_decay"], fine["bits"], wide["weight_decay"]) == (0.0, 32, 0.0)
    assert "bits" not in wide  # alone it has 8 bits, too
    advance(optimizer, flats, params, range(1))
    state = {p.numel(): s["state1"].dtype for p, s in optimizer.state.items()}
    assert (state[512], state[4100], state[64 * 96 * 2 + 256]) == (torch.float32, torch.uint8, torch.uint8)


def test_small_vectors_keep_float32_moments_however_many() -> None:
    params = [nn.Parameter(torch.zeros(512)) for _ in range(20)]
    _, made = options("adamw_8bit")
    found, flats = gather(buckets([{"params": params, "lr": 1.0, "weight_decay": 0.0}], lambda p: 0, PAGED_FROM))
    optimizer = importlib.import_module("ftrun.optim.adamw_bnb").build(found, made, "cpu")
    for p in params:
        p.grad = torch.ones_like(p)
    flats.gather_gradients()
    optimizer.step()
    assert [s["state1"].dtype for s in optimizer.state.values()] == [torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_training_is_the_same_as_without(name: str, dtype: torch.dtype) -> None:
    """Bit for bit, in 8 bits as well: no block of 256 spans two parameters. Only small matrices go from 32 to 8."""
    ours, theirs = weights(dtype), weights(dtype)
    for params, below in ((ours, PAGED_FROM), (theirs, 0)):
        optimizer, flats = gathered(name, params, below)
        advance(optimizer, flats, params, range(4))
        assert len(flats.flats) == (2 if below else 0)
    for mine, other in zip(ours, theirs, strict=True):
        if mine.shape == (5, 7) and "8bit" in name:
            assert torch.allclose(mine, other, atol=0.02)
        else:
            assert torch.equal(mine, other)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_restored_state_takes_the_same_step(name: str) -> None:
    ours = weights()
    optimizer, flats = gathered(name, ours)
    advance(optimizer, flats, ours, range(3))
    tensors, meta = flatten(optimizer)
    blob, text = save(tensors), json.dumps(meta)
    theirs = weights()
    other, other_flats = gathered(name, theirs)
    with torch.no_grad():
        for mine, copy in zip(ours, theirs, strict=True):
            copy.copy_(mine)
    restore(other, load(blob), json.loads(text))
    advance(optimizer, flats, ours, range(3, 5))
    advance(other, other_flats, theirs, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_small_gradients_go_as_they_are_copied() -> None:
    params = weights()
    optimizer, flats = gathered("paged_adamw_32bit", params)
    for p in params:
        p.grad = torch.ones_like(p)
    gone = [weakref.ref(p.grad.untyped_storage()) for p in params[:6]]
    alone = [p for p in params if flats.holder(p) is p]
    assert [tuple(p.shape) for p in alone] == [(64, 96), (4100,), (9, 3), (400, 256)]
    flats.gather_gradients()
    assert [p.grad is None for p in params] == [p not in set(alone) for p in params]
    assert sum(ref() is not None for ref in gone) == 1  # of the one that stays alone
    assert [int(flat.parameter.grad.sum()) for flat in flats.flats] == [57, 2 * 64 * 96 + 35]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])


def test_a_missing_gradient_counts_as_zeros_unless_all_are_missing() -> None:
    params = weights()
    _, flats = gathered("lion", params)
    params[0].grad = torch.ones_like(params[0])
    flats.gather_gradients()
    assert [flat.parameter.grad is None for flat in flats.flats] == [True, False]
    assert int(flats.flats[1].parameter.grad.count_nonzero()) == 64 * 96


def test_parameters_stay_views_where_values_are_written_in_place() -> None:
    module = nn.ParameterList(weights())
    before = [p.detach().clone() for p in module]
    optimizer, flats = gathered("lion", list(module))
    assert all(torch.equal(p, b) for p, b in zip(module, before, strict=True))
    assert all(flat.parameter.numel() == size_of(flat.pieces) for flat in flats.flats)
    with torch.no_grad():
        for p in module:
            p.copy_(p + 1)
    module.to("cpu").float()
    held = [flats.holder(p) for p in module]
    assert all(h.untyped_storage()._cdata == p.untyped_storage()._cdata for h, p in zip(held, module, strict=True))
    advance(optimizer, flats, list(module), range(1))
    assert not any(torch.equal(p, b + 1) for p, b in zip(module, before, strict=True))


def test_a_parameter_that_was_moved_is_told() -> None:
    params = weights()
    optimizer, flats = gathered("lion", params)
    params[0].data = params[0].data.clone()
    with pytest.raises(RuntimeError, match="moved or replaced"):
        advance(optimizer, flats, params, range(1))


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_abstract_tensors_are_gathered_alike(kind: str) -> None:
    if kind == "meta":
        params = [nn.Parameter(torch.empty(s, device="meta")) for _, s in SHAPES]
        optimizer, flats = gathered("lion", params)
    else:
        with FakeTensorMode():
            params = [nn.Parameter(torch.empty(s)) for _, s in SHAPES]
            optimizer, flats = gathered("lion", params)
            advance(optimizer, flats, params, range(2))
    assert [tuple(p.shape) for p in params] == [s for _, s in SHAPES]
    assert [flat.parameter.numel() for flat in flats.flats] == [512, 2 * 64 * 96 + 256]
    own = {flat.parameter.untyped_storage()._cdata for flat in flats.flats}
    assert sum(p.untyped_storage()._cdata in own for p in params) == 5
