"""metrics.jsonl and evals.jsonl: one JSON object a line for each step and each evaluation, flushed as they come."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ftrun.runs import finite
from ftrun.values import EvalRecord, StepRecord

_TRIES, _PAUSE = 10, 0.2  # seconds


class JsonLines:
    """The sink of both files.

    after: the step of the checkpoint that the run goes on from: later lines are dropped, since their steps come
    again. None: the run begins, and the files are begun anew. again: the evaluation after that step comes again as
    well. say: hears of damaged lines, which are left out.
    """

    def __init__(
        self, after: int | None = None, again: bool = False, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.after, self.again, self.say_damage = after, again, say
        self._metrics: TextIO | None = None
        self._evals: TextIO | None = None

    def start(self, job: dict[str, Any], run: Path) -> None:
        self._metrics = _open(run / "metrics.jsonl", self.after, self.say_damage)
        last = None if self.after is None else self.after - self.again
        self._evals = _open(run / "evals.jsonl", last, self.say_damage)

    def step(self, record: StepRecord) -> None:
        row = asdict(record)
        if not row["skipped"]:  # it is rare, and told where it is so
            del row["skipped"]
        _write(self._metrics, row)

    def evaluation(self, record: EvalRecord) -> None:
        row = asdict(record)
        extra = row.pop("extra")
        _write(self._evals, {**row, **extra})

    def say(self, text: str) -> None:
        """Lines are for log.txt."""

    def close(self, result: dict[str, Any] | None) -> None:
        for file in (self._metrics, self._evals):
            if file is not None:
                with suppress(OSError):  # a full disk was told of when the record came
                    file.close()
        self._metrics = self._evals = None


def read(path: Path, say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """The records of a file; a last line that a killed process left torn is left out, and so are damaged ones."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    rows = []
    for number, line in enumerate(whole.split("\n") if whole else (), start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            say(f"warning: {path}: line {number} is damaged and left out")
    return rows


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _open(path: Path, after: int | None, say: Callable[[str], None]) -> TextIO:
    """The file, open for appending, cut after the last record of step `after`."""
    kept = [] if after is None else [row for row in read(path, say) if row["step"] <= after]
    fresh = path.with_suffix(".jsonl.new")
    fresh.write_text("".join(f"{_line(row)}\n" for row in kept), encoding="utf-8")
    os.replace(fresh, path)
    return path.open("a", encoding="utf-8")


def _write(file: TextIO | None, row: dict[str, Any]) -> None:
    assert file is not None, "a record came before the sink was started"
    try:
        file.write(_line(row) + "\n")
        _flush(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error


def _flush(file: TextIO) -> None:
    """What a full disk does not take stays in the buffer, and is tried again: a checkpoint that fills the disk while it
    is being written is taken away when it fails.
    """
    for _ in range(_TRIES):
        try:
            file.flush()
            return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            time.sleep(_PAUSE)
    file.flush()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row), ensure_ascii=False, allow_nan=False)
