"""Successive halving: every point begins, and at each rung the best go on to so many times the steps.

Jamieson and Talwalkar, Non-stochastic best arm identification and hyperparameter optimization, 2016, arXiv:1502.07943;
synchronous: a rung is judged when all of it is there. A run is left with a checkpoint and gone on with from there, on
the learning rates of the whole job.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ftrun.errors import UserError
from ftrun.schema import option
from ftrun.studies.search.random import draws
from ftrun.studies.searching import Outcome, Trial, grid, shared
from ftrun.studies.searching import Search as Base
from ftrun.studies.study import Axis


@dataclass(frozen=True)
class Options:
    grows: ClassVar[tuple[str, ...]] = ("axes", "search.trials")
    first: int = option(20, "steps of the first rung", ge=1)
    factor: int = option(3, "one point in so many goes on, to so many times the steps", ge=2)
    trials: int | None = option(None, "points to draw at random; null: every combination", ge=1)
    seed: int = option(0, "seed of the draws", ge=0, le=2**32 - 1)


class Search(Base):
    """Asks for a whole rung, waits until it is told how each of its points stands, and asks for the next one."""

    def __init__(self, options: Options, axes: Sequence[Axis], overrides: Sequence[str]) -> None:
        super().__init__(options, axes, overrides)
        self.steps = _steps(options, axes, overrides)
        self._points = _points(options, axes)
        self._ladder = ladder(options.first, options.factor, self.steps)
        self.rungs = frozenset(self._ladder[:-1])
        self._asked = 0
        self._at_work: dict[int, int] = {}  # number of a trial -> its point
        self._reached = [0] * len(self._points)  # steps trained
        self._whole = [self.steps] * len(self._points)  # steps that training it to the end would have taken
        self._unjudged = 0
        self._entered: list[tuple[int, int]] = []  # of each rung: its steps, its points
        self._enter(range(len(self._points)), 0)

    def ask(self) -> Trial | None:
        if not self._waiting:
            return None
        point, number = self._waiting.pop(0), self._asked
        self._asked += 1
        self._at_work[number] = point
        until = self._ladder[self._rung]
        return Trial(number, self._points[point], until=until if until < self.steps else None)

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        point, figures = self._at_work.pop(trial.number), outcome.figures
        if outcome.status == "paused":
            self._reached[point] = trial.until or self.steps
            self._judge(point, figures.get("rung_loss"))
        else:
            self._reached[point] = self._whole[point] = max(self._reached[point], int(figures.get("steps") or 0))
        if outcome.status == "finished":
            self._judge(point, figures.get("loss"))
        if not self._waiting and not self._at_work and self._ladder[self._rung] < self.steps:
            self._climb()

    def points(self) -> list[Mapping[str, str]]:
        return list(self._points)

    @property
    def share(self) -> float:
        count, done, trained = len(self._points), 0, 0
        for rung in self._ladder:
            steps = rung if count > 1 else self.steps
            trained += count * max(0, steps - done)
            count, done = self._quota(count), max(done, steps)
        return trained / (len(self._points) * self.steps)

    @property
    def left(self) -> float:
        target, count = self._ladder[self._rung], self._count
        steps = sum(max(0, target - self._reached[point]) for point in (*self._waiting, *self._at_work.values()))
        done = target
        for rung in self._ladder[self._rung + 1 :]:
            count = self._quota(count)
            goal = rung if count > 1 else self.steps
            steps, done = steps + count * max(0, goal - done), max(done, goal)
        return steps / (len(self._points) * self.steps)

    def sentences(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        whole, trained = sum(self._whole), sum(self._reached)
        if not whole:
            return []
        rungs = ", ".join(f"{count} to step {steps}" for steps, count in self._entered)
        found = [
            f"Of {len(self._points)} points {rungs}: {trained} steps in all, where training each to its end takes "
            f"{whole} ({trained / whole:.0%})"
        ]
        if self._unjudged:
            found.append(f"{self._unjudged} had no held-out loss at their rung, and went no further")
        return found

    def _enter(self, points: Iterable[int], rung: int) -> None:
        """The points of a rung; one alone has nobody to be measured against, and goes to the end."""
        self._waiting = list(points)
        self._rung = rung if len(self._waiting) > 1 else len(self._ladder) - 1
        self._count, self._losses = len(self._waiting), dict[int, float]()
        if self._waiting:
            self._entered.append((self._ladder[self._rung], self._count))

    def _climb(self) -> None:
        """The best of a rung go on to the next; of equal ones the one that comes first."""
        best = sorted(self._losses, key=lambda point: (self._losses[point], point))
        self._enter(best[: self._quota(self._count)], self._rung + 1)

    def _judge(self, point: int, loss: float | None) -> None:
        self._unjudged += loss is None
        if loss is not None:
            self._losses[point] = float(loss)

    def _quota(self, count: int) -> int:
        return max(1, count // self.options.factor)


def ladder(first: int, factor: int, steps: int) -> list[int]:
    """The steps at which points are compared, the job's own end last."""
    found = [first]
    while found[-1] * factor < steps:
        found.append(found[-1] * factor)
    return [*found, steps]


def _steps(options: Options, axes: Sequence[Axis], overrides: Sequence[str]) -> int:
    """The steps of every job. Raises UserError where they are not known, or too few, or nothing is measured there."""
    swept = {axis.key for axis in axes} & {"steps", "epochs"}
    if swept:
        raise UserError(f"search=halving compares points after the same steps: {swept.pop()} cannot be swept")
    steps = shared(overrides, "steps")
    if not isinstance(steps, int):
        raise UserError(
            "search=halving needs steps=N among the overrides: its rungs are parts of a run of known length"
        )
    if steps <= options.first:
        raise UserError(f"search.first={options.first}: expected fewer than steps={steps}")
    if shared(overrides, "eval") == "none":
        raise UserError("search=halving goes by the held-out loss at each rung, and eval=none measures none")
    return steps


def _points(options: Options, axes: Sequence[Axis]) -> list[Mapping[str, str]]:
    if not axes:
        raise UserError("search=halving: nothing is swept; write KEY=a,b,c or KEY=interval(LOW,HIGH)")
    if options.trials is not None:
        return draws(axes, options.trials, options.seed)
    interval = next((axis for axis in axes if axis.is_interval), None)
    if interval is not None:
        raise UserError(f"{interval.key}: an interval has no points of its own; say how many to draw: trials=N")
    return list(grid(axes))
