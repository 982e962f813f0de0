"""metrics.jsonl and evals.jsonl: one JSON object a line for each step and each evaluation, flushed as they come."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ftrun.values import EvalRecord, StepRecord


class JsonLines:
    """The sink of both files.

    after: the step of the checkpoint that the run goes on from: later lines are dropped, since their steps come
    again. None: the run begins, and the files are begun anew.
    """

    def __init__(self, after: int | None = None) -> None:
        self.after = after
        self._metrics: TextIO | None = None
        self._evals: TextIO | None = None

    def start(self, job: dict[str, Any], run: Path) -> None:
        self._metrics = _open(run / "metrics.jsonl", self.after)
        self._evals = _open(run / "evals.jsonl", self.after)

    def step(self, record: StepRecord) -> None:
        _write(self._metrics, asdict(record))

    def evaluation(self, record: EvalRecord) -> None:
        row = asdict(record)
        extra = row.pop("extra")
        _write(self._evals, {**row, **extra})

    def say(self, text: str) -> None:
        """Lines are for log.txt."""

    def close(self, result: dict[str, Any] | None) -> None:
        for file in (self._metrics, self._evals):
            if file is not None:
                file.close()
        self._metrics = self._evals = None


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of records; a last line that a killed process left torn is left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def _open(path: Path, after: int | None) -> TextIO:
    """The file, open for appending, cut after the last record of step `after`."""
    kept = [] if after is None else [row for row in read(path) if row["step"] <= after]
    fresh = path.with_suffix(".jsonl.new")
    fresh.write_text("".join(f"{_line(row)}\n" for row in kept), encoding="utf-8")
    os.replace(fresh, path)
    return path.open("a", encoding="utf-8")


def _write(file: TextIO | None, row: dict[str, Any]) -> None:
    assert file is not None, "a record came before the sink was started"
    file.write(_line(row) + "\n")
    file.flush()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """The value with null for what JSON has no number for: infinity and NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
