"""metrics.jsonl and evals.jsonl: one JSON object a line for each step and each evaluation, written as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftrun.metrics.lines import Lines
from ftrun.runs import aside, finite
from ftrun.values import EvalRecord, StepRecord

_METRICS, _EVALS = "metrics.jsonl", "evals.jsonl"
Row = dict[str, Any]


class JsonLines:
    """The sink of both files.

    after: the step of the checkpoint that the run goes on from: later lines are dropped, since their steps come
    again. None: the run begins, and the files are begun anew. again: the evaluation after that step comes again as
    well. kept: the files as the checkpoint holds them; lines that are lost are taken from there. say: hears of lost and
    damaged lines, and of a disk that is full.
    """

    def __init__(
        self,
        after: int | None = None,
        again: bool = False,
        say: Callable[[str], None] = lambda text: None,
        kept: Mapping[str, bytes] | None = None,
    ) -> None:
        self.after, self.again, self.tell, self.kept = after, again, say, kept or {}
        self._files: dict[str, Lines] = {}
        self._short: set[str] = set()  # files that were said to wait for room

    def start(self, job: dict[str, Any], run: Path) -> None:
        last = None if self.after is None else self.after - self.again
        for name, step in ((_METRICS, self.after), (_EVALS, last)):
            self._files[name] = _open(run / name, step, self.kept.get(name, b""), self.tell)

    def step(self, record: StepRecord) -> None:
        row = asdict(record)
        if not row["skipped"]:  # it is rare, and told where it is so
            del row["skipped"]
        self._add(_METRICS, row)

    def evaluation(self, record: EvalRecord) -> None:
        row = asdict(record)
        extra = row.pop("extra")
        self._add(_EVALS, {**row, **extra})

    def say(self, text: str) -> None:
        """Lines are for log.txt."""

    def close(self, result: dict[str, Any] | None) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def content(self) -> dict[str, bytes]:
        """Both files as they are, or would be on a disk with room."""
        return {name: file.content() for name, file in self._files.items()}

    def settle(self) -> None:
        """Both files to the disk itself. Raises OSError, with the file's name, where there is no room."""
        for file in self._files.values():
            file.settle()

    def _add(self, name: str, row: Row) -> None:
        file = self._files[name]
        file.add(_line(row))
        if file.trouble is not None and name not in self._short:
            self._short.add(name)
            self.tell(
                f"WARNING: {file.path}: CANNOT BE WRITTEN: {file.trouble.strerror}. The run goes on, and its lines "
                "wait for room"
            )
        elif file.trouble is None and name in self._short:
            self._short.remove(name)
            self.tell(f"{file.path}: there is room again; no line is lost")


def read(path: Path, say: Callable[[str], None] = lambda text: None) -> list[Row]:
    """The records of a file; a last line that a killed process left torn is left out, and so are damaged ones."""
    return _rows(path.read_bytes(), path, say) if path.exists() else []


def _rows(content: bytes, path: Path, say: Callable[[str], None]) -> list[Row]:
    whole, _, _ = content.decode("utf-8", "replace").rpartition("\n")
    rows = []
    for number, line in enumerate(whole.split("\n") if whole else (), start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            say(f"warning: {path}: line {number} is damaged and left out")
    return rows


def _row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _open(path: Path, after: int | None, kept: bytes, say: Callable[[str], None]) -> Lines:
    """The file, open for appending, with the records up to step `after`."""
    rows: list[Row] = []
    if after is not None:
        there, known = (
            [row for row in found if row["step"] <= after] for found in (read(path, say), _rows(kept, path, say))
        )
        rows = _joined(there, known)
        if lost := len(rows) - len(there):
            say(f"warning: {path}: {lost} lines were lost; they are taken from the checkpoint")
    with aside(path) as fresh:
        fresh.write_text("".join(f"{_line(row)}\n" for row in rows), encoding="utf-8")
    return Lines(path)


def _joined(there: Sequence[Row], known: Sequence[Row]) -> list[Row]:
    """The records of both in the order of their steps, each step's from `known` where that has as many of them."""
    found: tuple[dict[int, list[Row]], ...] = ({}, {})
    for rows, by_step in zip((known, there), found, strict=True):
        for row in rows:
            by_step.setdefault(row["step"], []).append(row)
    steps = sorted({*found[0], *found[1]})
    return [row for step in steps for row in max((one.get(step, []) for one in found), key=len)]


def _line(row: Row) -> str:
    return json.dumps(finite(row), ensure_ascii=False, allow_nan=False)
