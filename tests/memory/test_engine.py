"""Sums of the autograd engine: what is planned on fake tensors is what the allocator sees on real ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ftrun.memory.events import allocations
from ftrun.memory.track import Tracker

N = 1 << 16


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x * 2

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad + grad  # a sum of a node's own is never in place


def tied(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x * w * w).sum() + w.sin().sum()


def residual(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        x = x + (x * w).sin()
    return x.sum()


def viewed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x * w
    return (y.view(256, -1).t() * 2).sum() + (y.view(-1, 256) * 3).sum() + Doubled.apply(y).sum()


def own_function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = Doubled.apply(x * w)
    return (y * y + Doubled.apply(y)).sum()


@pytest.mark.parametrize("loss", [tied, residual, viewed, own_function])
def test_planned_is_measured(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    def step() -> None:
        loss(x, w).backward()
        x.grad = w.grad = None

    with FakeTensorMode():
        x, w = (torch.ones(N, requires_grad=True) for _ in range(2))
        with Tracker() as tracker:
            tracker.mark([x, w], "weights")
            tracker.restart()
            before = tracker.now.total
            step()
            planned = tracker.peak.peak.total - before
    x, w = (torch.ones(N, requires_grad=True) for _ in range(2))
    step()
    with allocations() as seen:
        step()
    assert planned == pytest.approx(seen.peak, abs=N)  # a quarter of a tensor: sums have small buffers
