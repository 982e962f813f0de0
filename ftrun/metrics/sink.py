"""What consumes a run's records. A sink never holds the trainer: it sees plain values only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ftrun.values import EvalRecord, StepRecord


class Sink(Protocol):
    """Calls come in this order: start, then any of step, evaluation and say, then close, once each for the ends."""

    def start(self, job: dict[str, Any], run: Path) -> None:
        """The composed job as plain values, and the run's folder, which exists."""

    def step(self, record: StepRecord) -> None:
        """An optimiser step has ended."""

    def evaluation(self, record: EvalRecord) -> None:
        """An evaluation has ended."""

    def say(self, text: str) -> None:
        """A line for the user."""

    def close(self, result: dict[str, Any] | None) -> None:
        """The run has ended: with the values of result.json, or None where it failed."""
