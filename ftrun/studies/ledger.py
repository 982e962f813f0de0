"""What happened in a study, one JSON object a line, on disk before it counts: what a killed study goes on from.

{"event": "trial", "number": 3, "key": "9f…", "values": {"rank": "8"}, "folder": "rank8-9f…", "until": null}
{"event": "begin", "number": 3, "key": "9f…"}
{"event": "rung", "number": 3, "step": 20, "loss": 2.9, "go": true}    where a search may stop a trial on the way
{"event": "end", "number": 3, "key": …, "status": "finished", "reason": null, "figures": {…}}
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftrun.errors import UserError
from ftrun.runs import finite
from ftrun.secrets import hidden


class Ledger:
    """The events so far, in order, and the file that they are added to."""

    def __init__(self, path: Path, say: Callable[[str], None] = lambda text: None) -> None:
        """Raises UserError where the file cannot be read or written."""
        self.path = path
        self.events: list[dict[str, Any]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.events = read(path, say)
            self._file = path.open("ab")
            self._file.truncate(_whole(path))
        except OSError as error:
            raise UserError(f"{path}: the study's ledger cannot be used: {error.strerror}") from error

    def add(self, event: str, **fields: Any) -> dict[str, Any]:
        """One more event, its secrets hidden, on disk when this returns. Raises OSError."""
        row = finite(hidden({"event": event, **fields, "at": round(time.time(), 3)}))
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False, default=str).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.events.append(row)
        return row

    def close(self) -> None:
        """Close the file; what a full disk did not take has been told of."""
        with contextlib.suppress(OSError):
            self._file.close()

    def of(self, event: str) -> list[dict[str, Any]]:
        """The events of one kind, in order."""
        return [row for row in self.events if row["event"] == event]

    def last(self, event: str, **fields: Any) -> dict[str, Any] | None:
        """The newest event of a kind with these values; None where there is none."""
        rows = (r for r in reversed(self.events) if r["event"] == event)
        return next((r for r in rows if all(r.get(k) == v for k, v in fields.items())), None)


def read(path: Path, say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """The events of a file; a last line that a kill left torn is left out, damaged ones too, said aloud."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes()[: _whole(path)].splitlines(), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("event"), str):
                raise ValueError
            rows.append(row)
        except (ValueError, RecursionError):
            say(f"warning: {path}: line {number} is damaged and left out")
    return rows


def _whole(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1
