"""Which rows at once and how many recomputed layers `auto` comes to, from what each choice would need."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ftrun.planning.settle import ENOUGH, _choose

ROWS, GRAPHS = [16, 8, 4, 2, 1], 10


def chosen(free: float, *, row: float = 10, kept: float = 8, tokens: int = 100) -> tuple[tuple[int, int], bool, int]:
    """((rows, layers), whether they fit, how many choices were planned), where each row takes `row`, of which a layer
    that is computed again gives back a tenth of `kept`. tokens: of a row."""
    tries: dict[tuple[int, int], Any] = {}

    def attempt(rows: int, layers: int) -> Any:
        plan = SimpleNamespace(fits=rows * (row - kept * layers / GRAPHS) <= free, lengths=(tokens,) * rows)
        return tries.setdefault((rows, layers), SimpleNamespace(micro_batch=rows, recomputed=layers, plan=plan))

    found = _choose(ROWS, [0, GRAPHS], attempt)
    return (found.micro_batch, found.recomputed), found.plan.fits, len(tries)


@pytest.mark.parametrize(
    ("free", "tokens", "expected"),
    [
        (160, 100, (16, 0)),  # all rows at once
        (80, ENOUGH // 8, (8, 0)),  # enough for the device to be busy
        (80, 100, (16, 7)),  # too little for that: all rows, as few layers again as fit
        (9, 100, (4, 10)),  # one row alone does not fit but with layers computed again
    ],
)
def test_the_choice(free: float, tokens: int, expected: tuple[int, int]) -> None:
    assert chosen(free, tokens=tokens)[:2] == (expected, True)


def test_where_nothing_fits_little_is_planned() -> None:
    assert chosen(1) == ((1, 10), False, 3)


def test_what_fits_without_computing_again_is_taken_where_that_makes_no_room() -> None:
    """Of a few small layers what is computed again may take more than what it gives back."""
    assert chosen(20, kept=-2)[:2] == ((2, 0), True)
    assert chosen(11, kept=-2)[:2] == ((1, 0), True)
