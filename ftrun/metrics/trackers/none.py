"""No tracker: the console, metrics.jsonl and evals.jsonl are always written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ftrun.metrics.options import LogOptions
from ftrun.metrics.sink import Sink


@dataclass(frozen=True)
class Options(LogOptions):
    pass


def sink(options: Options, name: str, say: Callable[[str], None]) -> Sink | None:
    """name: the run's. say: takes a line for the user. No sink here."""
    return None
