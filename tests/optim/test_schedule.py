"""The schedule against transformers' `get_scheduler`, and what differs in the warm-up, on purpose."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from ftrun.errors import UserError
from ftrun.optim.options import OptimOptions
from ftrun.optim.schedule import rate, warmup_steps

TOTAL = 50
NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def theirs(schedule: str, warmup: int, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(NAMES[schedule], optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("warmup", [0, 0.1, 7])
def test_equals_transformers_after_the_warmup(schedule: str, warmup: float) -> None:
    options = OptimOptions(schedule=schedule, warmup=warmup)
    rising = warmup_steps(TOTAL, options)
    assert rising == (7 if warmup == 7 else round(warmup * TOTAL))
    ours = [rate(step, TOTAL, options) for step in range(TOTAL)]
    assert ours[rising:] == pytest.approx(theirs(schedule, rising, TOTAL)[rising:], abs=1e-12)


def test_the_warmup_is_theirs_one_step_ahead() -> None:
    options = OptimOptions(schedule="linear", warmup=7)
    ours = [rate(step, TOTAL, options) for step in range(7)]
    assert ours == pytest.approx(theirs("linear", 8, TOTAL)[1:8], abs=1e-12)


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_no_step_is_wasted(schedule: str, total: int) -> None:
    options = OptimOptions(schedule=schedule)
    rates = [rate(step, total, options) for step in range(total)]
    assert min(rates) > 0
    assert max(rates) == 1.0


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.warmup=50: expected fewer steps than the run's 50"):
        rate(0, TOTAL, OptimOptions(warmup=TOTAL))


def test_a_warmup_of_one_and_a_half_steps_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.warmup=1\.5"):
        OptimOptions(warmup=1.5)
