"""What a search is: it says which point to try next, hears how each one ended, and may stop one on the way."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ftrun.compose import compose
from ftrun.errors import UserError
from ftrun.shell import parse
from ftrun.studies.study import Axis

# figures that a study may aim at -> whether lower is better
OBJECTIVES = {
    "loss": True,
    "peak_bytes": True,
    "tokens_per_s": False,
    "seconds": True,
    "trainable_params": True,
    "adapter_bytes": True,
    "retention": True,
}


@dataclass(frozen=True)
class Trial:
    """One thing to do, as a search asks for it.

    number: the search's own, from 0 on. until: steps after which the run is left with a checkpoint, to be gone on with
    by a later trial of the same values (None: to its end). asks: its evaluations wait for `verdict`. kind: "train", or
    "probe" (see ftrun/tasks/probe.py). request: what its worker is told besides the job.
    """

    number: int
    values: Mapping[str, str]
    until: int | None = None
    asks: bool = False
    kind: str = "train"
    note: str = ""  # in a word or two, for the table
    request: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. status: finished, paused (at `until`), pruned, failed, diverged, does_not_fit or invalid."""

    status: str
    reason: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)  # loss, peak_bytes, … : see rows.figures_of
    probe: Mapping[str, Any] | None = None  # what a probe found


class Search(ABC):
    """One search at work. The driver asks until it hears None twice: once while trials run, once when none does.

    rungs: steps at which trials are evaluated besides what their jobs say. depends: whether what is asked for depends
    on what was told, so that a study that goes on must hear everything again in the order in which it happened.
    retries: whether it is then not told of trials that failed: they are tried again.
    """

    depends: ClassVar[bool] = False
    retries: ClassVar[bool] = False
    rungs: frozenset[int] = frozenset()

    def __init__(self, options: Any, axes: Sequence[Axis], overrides: Sequence[str]) -> None:
        """Raises UserError where axes and options do not suit each other. overrides: those of every job, as typed."""
        self.options, self.axes, self.overrides = options, tuple(axes), tuple(overrides)

    @abstractmethod
    def ask(self) -> Trial | None:
        """The next trial; None where there is none now (later, when others have ended, there may be)."""

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        """How a trial ended."""
        del trial, outcome

    def verdict(self, trial: Trial, step: int, loss: float) -> bool:
        """Whether a trial that asks goes on after this evaluation."""
        del trial, step, loss
        return True

    def points(self) -> list[Mapping[str, str]]:
        """The points that are certain to be tried, as far as they are known before anything has run."""
        return []

    @property
    def objectives(self) -> tuple[str, ...]:
        """The figures that the study is judged by; the first one's order is the table's."""
        return tuple(getattr(self.options, "objectives", ("loss",)))

    @property
    def at_once(self) -> int:
        """How many trials may be asked for before the first of them is told."""
        return 1 << 30

    @property
    def more(self) -> bool:
        """Whether others follow those, that are not known before."""
        return not self.points()

    @property
    def share(self) -> float:
        """The part of all these points' steps that is trained at most."""
        return 1.0

    @property
    def left(self) -> float | None:
        """The part of all these points' steps that is still to be trained at most; None: the driver's own count."""
        return None

    def sentences(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """What the search has found, in words, for the end of the study. rows: as the table has them."""
        del rows
        return []


def grid(axes: Sequence[Axis]) -> Iterator[dict[str, str]]:
    """Every combination, the last axis fastest. Raises UserError on an interval, which has no points."""
    for axis in axes:
        if axis.is_interval:
            low, high = f"{axis.low:g}", f"{axis.high:g}"
            raise UserError(
                f"{axis.key}=interval({low},{high}): an interval has no points of its own; name them, as "
                f"{axis.key}={low},{high}, or let a search draw them: search=random, optuna"
            )
    for values in itertools.product(*(axis.points for axis in axes)):
        yield dict(zip((axis.key for axis in axes), values, strict=True))


def shared(overrides: Sequence[str], key: str) -> Any:
    """What every job of a study has for a key, by its overrides, its recipe or its file; None where none of them says.

    key: "steps", "eval.every"; a group's name gives its choice.
    """
    named = {one.key: one.value for one in parse(overrides, multirun=False)}
    if key in named or not named.keys() & {"recipe", "job"}:
        return named.get(key)
    try:
        job = compose(overrides)
    except UserError:  # what is missing may come with the point; what is wrong its job says itself
        return None
    found: Any = {**job.tree, **({key: job.choices[key]} if key in job.choices else {})}
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
