"""The singular values of B A and their effective rank, against planted ones and against a dense decomposition."""

from __future__ import annotations

import pytest
import torch

from ftrun.kernels.spectrum import effective_rank, singular_values


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(values: list[float], wide: int = 40, tall: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, wide) and B (tall, rank) whose product has these singular values."""
    rank = len(values)
    left, right = (torch.linalg.qr(numbers(size, rank, seed=size)).Q for size in (tall, wide))
    turn = numbers(rank, rank, seed=7)  # B A = (B T) (T⁻¹ A): the factors alone show nothing
    return torch.linalg.inv(turn) @ (torch.tensor(values)[:, None] * right.T), left @ turn


def test_one_direction_is_a_rank_of_one() -> None:
    a, b = planted([3.0, 0.0, 0.0, 0.0])
    assert float(effective_rank(singular_values(a, b))) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_equal_directions_are_the_whole_rank(rank: int) -> None:
    a, b = planted([0.5] * rank)
    assert float(effective_rank(singular_values(a, b))) == pytest.approx(rank, rel=1e-4)


def test_two_unequal_directions() -> None:
    # shares 3/4 and 1/4: exp(-(3/4 ln 3/4 + 1/4 ln 1/4)) = 4 / 3^(3/4)
    a, b = planted([3.0, 1.0])
    assert float(effective_rank(singular_values(a, b))) == pytest.approx(4 / 3**0.75, rel=1e-5)


@pytest.mark.parametrize(("rank", "wide", "tall"), [(4, 30, 50), (8, 30, 5), (40, 30, 50), (3, 1, 9)])
def test_they_are_those_of_the_dense_product(rank: int, wide: int, tall: int) -> None:
    a, b = numbers(rank, wide), numbers(tall, rank, seed=1)
    dense = torch.linalg.svdvals(b.double() @ a.double())[: min(rank, wide, tall)]
    found = singular_values(a, b)
    assert found.shape == dense.shape
    assert float((found - dense).abs().max()) < 1e-5 * float(dense[0])
    shares = dense / dense.sum()
    assert float(effective_rank(found)) == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-4)


def test_experts_come_one_by_one() -> None:
    a, b = numbers(3, 4, 20), numbers(3, 10, 4, seed=1)
    together = effective_rank(singular_values(a, b))
    assert together.shape == (3,)
    for number in range(3):
        alone = effective_rank(singular_values(a[number], b[number]))
        assert float(together[number]) == pytest.approx(float(alone), rel=1e-5)


def test_an_update_that_is_nothing_has_no_rank() -> None:
    a, b = numbers(4, 20), torch.zeros(10, 4)
    assert float(effective_rank(singular_values(a, b))) == 0.0


def test_sixteen_bits_and_gradients_are_no_matter() -> None:
    a, b = planted([2.0, 1.0])
    found = singular_values(a.bfloat16().requires_grad_(), b.bfloat16().requires_grad_())
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert found.tolist() == pytest.approx([2.0, 1.0], rel=0.05)


def test_the_product_is_never_formed() -> None:
    # it would take 160 GB
    a, b = numbers(2, 200_000), numbers(200_000, 2, seed=1)
    assert 1.9 < float(effective_rank(singular_values(a, b))) <= 2.0
