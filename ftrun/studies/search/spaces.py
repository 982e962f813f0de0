"""A study's axes as Optuna's distributions, and what is drawn from them as an override writes it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from ftrun.studies.search.random import written
from ftrun.studies.study import Axis

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_FEWEST = 3  # evenly spaced points from which on they are numbers with a step; two are a choice


def space(axes: Sequence[Axis]) -> dict[str, BaseDistribution]:
    """key -> an interval as a range of numbers, evenly spaced points as one with a step, other points as a choice."""
    return {axis.key: _distribution(axis) for axis in axes}


def values(axes: Sequence[Axis], drawn: Mapping[str, Any]) -> dict[str, str]:
    """What was drawn, key by key, in the words of the axes: a point as it was typed, an interval's number as text."""
    return {axis.key: _text(axis, drawn[axis.key]) for axis in axes}


def _distribution(axis: Axis) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.low is not None and axis.high is not None:
        if axis.integer:
            return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        return FloatDistribution(float(axis.low), float(axis.high), log=axis.log)
    numbers = _evenly_spaced(axis.points)
    if numbers is None:
        return CategoricalDistribution(axis.points)
    low, high, step = numbers[0], numbers[-1], numbers[1] - numbers[0]
    if all(n == n.to_integral_value() for n in (low, high, step)):
        return IntDistribution(int(low), int(high), step=int(step))
    return FloatDistribution(float(low), float(high), step=float(step))


def _evenly_spaced(points: Sequence[str]) -> list[Decimal] | None:
    """The points as numbers, lowest first, where all steps between them are equal; powers of two never are."""
    if len(points) < _FEWEST or not all(_NUMBER.fullmatch(point) for point in points):
        return None
    numbers = sorted(map(Decimal, points))
    steps = {high - low for low, high in itertools.pairwise(numbers)}
    return numbers if len(steps) == 1 and min(steps) > 0 else None


def _text(axis: Axis, drawn: Any) -> str:
    if axis.is_interval:
        return written(axis, drawn)
    if isinstance(drawn, str):
        return drawn
    return min(axis.points, key=lambda point: abs(float(point) - drawn))
