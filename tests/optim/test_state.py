"""Every optimiser that conf/optim names: it learns, and its state goes through safetensors and JSON bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load, save

from ftrun.optim.state import check, flatten, restore
from tests.optim.choices import CHOICES, build


def weights(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Above and below the 4,096 elements from which bitsandbytes uses 8 bits; a vector; one that starts at zero."""
    g = torch.Generator().manual_seed(0)
    shapes = [(96, 64), (17, 16), (40,), (64, 96)]
    made = [torch.nn.Parameter(torch.randn(s, generator=g).to(dtype) * 0.1) for s in shapes]
    made[-1].data.zero_()
    return made


def advance(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], first: int, steps: int) -> None:
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CHOICES)
def test_restored_state_takes_the_same_step(name: str, dtype: torch.dtype) -> None:
    ours = weights(dtype)
    optimizer = build(name, ours)
    advance(optimizer, ours, 0, 3)
    tensors, meta = flatten(optimizer)
    blob, text = save(tensors), json.dumps(meta)

    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    other = build(name, theirs)
    restore(other, load(blob), json.loads(text))
    again, meta_again = flatten(other)
    assert meta_again == json.loads(text)
    assert all(torch.equal(again[k], tensors[k]) and again[k].dtype == tensors[k].dtype for k in tensors)

    advance(optimizer, ours, 3, 2)
    advance(other, theirs, 3, 2)
    for mine, yours in zip(ours, theirs, strict=True):
        assert torch.equal(mine, yours)


@pytest.mark.parametrize("name", CHOICES)
def test_the_state_matters(name: str) -> None:
    """A fresh optimiser takes another step: what the round trip above carries is not empty."""
    ours = weights()
    optimizer = build(name, ours)
    advance(optimizer, ours, 0, 3)
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    advance(optimizer, ours, 3, 1)
    advance(build(name, fresh), fresh, 3, 1)
    assert not all(torch.equal(a, b) for a, b in zip(ours, fresh, strict=True))


def test_a_shared_map_is_written_once() -> None:
    params = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(3)]
    optimizer = build("adamw_8bit", params)
    advance(optimizer, params, 0, 1)
    tensors, meta = flatten(optimizer)
    assert [k for k in tensors if "qmap" in k] == ["0.qmap1", "0.qmap2"]
    other = build("adamw_8bit", params)
    restore(other, tensors, meta)
    maps = {id(state["qmap1"]) for state in other.state.values()}
    assert len(maps) == 1


def test_another_layout_is_refused() -> None:
    params = weights()
    optimizer = build("adamw", params)
    advance(optimizer, params, 0, 1)
    tensors, meta = flatten(optimizer)
    with pytest.raises(ValueError, match="3 in groups of"):
        restore(build("adamw", params[:3]), tensors, meta)


@pytest.mark.parametrize("ranks", [[3], [{}], [{"groups": [], "shapes": [], "state": {"0": {}}}], 2])
def test_what_is_no_state_of_several_ranks_is_refused(ranks: object) -> None:
    tensors, meta = flatten(build("adamw", weights()))
    with pytest.raises((ValueError, TypeError)):
        check(tensors, {**meta, "ranks": ranks})
    check(tensors, {**meta, "ranks": [meta, meta]})
