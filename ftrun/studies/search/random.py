"""Points drawn at random: of each key's values, or from its interval, evenly or evenly in the logarithm."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ftrun.errors import UserError
from ftrun.schema import option
from ftrun.studies.searching import Search as Base
from ftrun.studies.searching import Trial
from ftrun.studies.study import Axis

_TRIES = 1000  # draws after which no new point is expected any more


@dataclass(frozen=True)
class Options:
    grows: ClassVar[tuple[str, ...]] = ("search.trials",)
    trials: int = option(20, "points to draw", ge=1)
    seed: int = option(0, "seed of the draws", ge=0, le=2**32 - 1)


class Search(Base):
    """Draws without putting back. More trials with the same seed begin with the same ones."""

    def __init__(self, options: Options, axes: Sequence[Axis], overrides: Sequence[str]) -> None:
        super().__init__(options, axes, overrides)
        if not axes:
            raise UserError("search=random: nothing is swept; write KEY=a,b,c or KEY=interval(LOW,HIGH)")
        self._points = draws(axes, options.trials, options.seed)
        self._asked = 0

    def ask(self) -> Trial | None:
        if self._asked == len(self._points):
            return None
        self._asked += 1
        return Trial(self._asked - 1, self._points[self._asked - 1])

    def points(self) -> list[Mapping[str, str]]:
        return list(self._points)


def draws(axes: Sequence[Axis], count: int, seed: int) -> list[Mapping[str, str]]:
    """`count` different points, fewer where the axes have no more."""
    rng = random.Random(seed)
    found: dict[tuple[str, ...], Mapping[str, str]] = {}
    for _ in range(_TRIES * count):
        point = {axis.key: draw(axis, rng) for axis in axes}
        found.setdefault(tuple(point.values()), point)
        if len(found) == count:
            break
    return list(found.values())


def draw(axis: Axis, rng: random.Random) -> str:
    """One value of an axis, as an override writes it."""
    if axis.low is None or axis.high is None:
        return rng.choice(axis.points)
    if axis.integer and not axis.log:
        return str(rng.randint(int(axis.low), int(axis.high)))
    low, high = (math.log(axis.low), math.log(axis.high)) if axis.log else (axis.low, axis.high)
    value = rng.uniform(low, high)
    return written(axis, math.exp(value) if axis.log else value)


def written(axis: Axis, value: float) -> str:
    """A number of an interval as an override writes it: to six digits, or whole, and within the interval."""
    assert axis.low is not None
    assert axis.high is not None
    if axis.integer:
        return str(min(int(axis.high), max(int(axis.low), round(value))))
    return f"{min(axis.high, max(axis.low, value)):.6g}"
