"""An optimiser's state moved from one process to the parts of several, and back: training goes on as it would have."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from ftrun.optim.gather import buckets, gather
from ftrun.optim.layout import Layout, fitted
from ftrun.optim.state import flatten, of_all, restore
from tests.optim.choices import CHOICES, options

# a half of the first is of whole blocks of 256; one that is gathered with a vector; one whose parts cut blocks
SHAPES = [(128, 128), (64, 96), (40,), (301, 50)]
Parts = list[torch.Tensor]


@dataclass
class Stage:
    """Some steps on so many ranks: each has its rows of every weight; one alone gathers the small ones."""

    name: str
    world: int

    def layouts(self) -> tuple[Layout, Layout]:
        wholes = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        numbers = {p: n for n, p in enumerate(wholes)}
        made = (Layout.of(self._groups(wholes, gathers), numbers) for gathers in (True, False))
        return next(made), next(made)

    def _groups(self, params: list[nn.Parameter], gathers: bool) -> list[dict[str, Any]]:
        groups = [{"params": params, "lr": 1e-2, "weight_decay": 0.0}]
        below = options(self.name)[1].gathers_below
        if gathers and below:
            return buckets(groups, lambda p: 0, below)
        return [{**groups[0], "params": [[p] for p in params]}]

    def run(self, weights: Parts, state: Any, steps: range) -> tuple[Parts, Any, bool]:
        """(weights, the state as it is saved, whether it came over exactly)."""
        known, saved, found, exact = self.layouts(), [], [], True
        kind, made = options(self.name)
        for rank in range(self.world):
            params = [nn.Parameter(self.cut(w, rank).clone()) for w in weights]
            groups, flats = gather(self._groups(params, self.world == 1))
            optimiser = importlib.import_module(f"ftrun.optim.{kind}").build(groups, made, "cpu")
            own = known[0] if self.world == 1 else known[1].part(rank, self.world)
            if state is not None:
                *moved, same = fitted(*state, own, known, optimiser)
                restore(optimiser, *moved)
                exact &= same
            for step in steps:
                g = torch.Generator().manual_seed(step)
                for parameter, shape in zip(params, SHAPES, strict=True):
                    parameter.grad = self.cut(torch.randn(shape, generator=g), rank)
                flats.gather_gradients()
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            found.append([p.detach() for p in params])
            saved.append(flatten(optimiser))
        joined = [torch.cat(pieces) for pieces in zip(*found, strict=True)]
        metas = [meta for _, meta in saved]
        left = saved[0] if self.world == 1 else (of_all([t for t, _ in saved]), {**metas[0], "ranks": metas})
        return joined, left, exact

    def cut(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        pieces = whole.chunk(self.world)
        return pieces[rank] if rank < len(pieces) else whole[:0]


def trained(name: str, worlds: list[int]) -> tuple[Parts, bool]:
    """The weights after three steps on each of so many ranks in turn, and whether every move was exact."""
    g = torch.Generator().manual_seed(99)
    weights, state, exact = [torch.randn(shape, generator=g) * 0.1 for shape in SHAPES], None, True
    for n, world in enumerate(worlds):
        weights, state, same = Stage(name, world).run(weights, state, range(3 * n, 3 * n + 3))
        exact &= same
    return weights, exact


@pytest.mark.parametrize("worlds", [[1, 2, 1], [2, 3, 1], [3, 2, 2]], ids=str)
@pytest.mark.parametrize("name", [c for c in CHOICES if c != "adafactor"])
def test_training_goes_on_as_if_nothing_had_moved(name: str, worlds: list[int]) -> None:
    stayed, _ = trained(name, [1, 1, 1])
    moved, exact = trained(name, worlds)
    eight = options(name)[1].bits == 8 if hasattr(options(name)[1], "bits") else False
    assert exact == (not eight)
    began = trained(name, [])[0]
    for one, other, first in zip(stayed, moved, began, strict=True):
        close = 0.1 if eight else 1e-5
        assert torch.linalg.norm(one - other) <= close * torch.linalg.norm(one - first)
    if eight and 3 not in worlds:  # its blocks stay whole: they moved as they were
        assert torch.equal(stayed[0], moved[0])


def test_a_part_that_is_missing_is_told() -> None:
    weights, (tensors, meta), _ = Stage("adamw_8bit", 3).run([torch.zeros(shape) for shape in SHAPES], None, range(1))
    two = {**meta, "ranks": meta["ranks"][:2]}
    stage = Stage("adamw_8bit", 1)
    with pytest.raises(ValueError, match="not of 2 devices' parts"):
        stage.run(weights, (tensors, two), range(1))
