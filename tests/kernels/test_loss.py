"""The chunked loss is the full loss, and holds one chunk of logits at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ftrun.kernels.loss import Shape, chunked_loss, full_loss

N, D, V = 70, 16, 101


def reference(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, shape: Shape) -> torch.Tensor:
    return full_loss(shape(F.linear(hidden, weight)), targets)


@pytest.mark.parametrize("shape", [Shape(), Shape(scale=0.25), Shape(cap=3.0), Shape(scale=1.7, cap=2.0)])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("chunk", [1, 16, 512])
def test_equals_the_full_loss(shape: Shape, frozen: bool, chunk: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(V, D, dtype=torch.float64)
    targets = torch.randint(0, V, (N,))
    hidden = torch.randn(N, D, dtype=torch.float64)
    first, second = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    expected = reference(first, weight, targets, shape)
    found = chunked_loss(second, targets, lambda h: F.linear(h, weight), weight if frozen else None, shape, chunk)
    (expected * 0.3).backward()
    (found * 0.3).backward()
    assert torch.allclose(found.double(), expected.double(), rtol=1e-6)
    assert torch.allclose(first.grad, second.grad, rtol=1e-4, atol=1e-6)


def test_a_trained_head_gets_its_gradient() -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(N, D), torch.randint(0, V, (N,))
    ours, theirs = (torch.nn.Linear(D, V, bias=True) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    chunked_loss(hidden, targets, ours, None, Shape(), 16).backward()
    full_loss(theirs(hidden), targets).backward()
    assert torch.allclose(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(ours.bias.grad, theirs.bias.grad, rtol=1e-4, atol=1e-5)


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    hidden, weight, targets = torch.randn(N, D), torch.randn(V, D), torch.randint(0, V, (N,))
    loss = chunked_loss(hidden, targets, torch.nn.Identity(), weight, Shape())
    assert not loss.requires_grad
    assert torch.allclose(loss, reference(hidden, weight, targets, Shape()), rtol=1e-5)


def test_bfloat16_stays_within_its_rounding() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(N, D), torch.randn(V, D) * 0.2, torch.randint(0, V, (N,))
    low = hidden.bfloat16().requires_grad_()
    high = hidden.bfloat16().float().requires_grad_()
    found = chunked_loss(low, targets, torch.nn.Identity(), weight.bfloat16(), Shape())
    expected = reference(high, weight.bfloat16().float(), targets, Shape())
    found.backward()
    expected.backward()
    assert found.dtype == torch.float32
    assert abs((found - expected).item()) < 2e-3 * expected.item()
    assert float((low.grad.float() - high.grad).norm() / high.grad.norm()) < 1e-2
