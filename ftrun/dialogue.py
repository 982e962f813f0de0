"""What a study and a worker on another machine say to one another, through files of a folder that both see.

TASK.json           what is to be done
TASK.events.jsonl   what its workers tell, one after the other: each attempt begins with {"event": "attempt"}
TASK.verdict        the answers to rungs: {"attempt": 1, "step": 20, "go": true}
TASK.stop           save a checkpoint and end
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def stop_asked(task: Path) -> bool:
    """Whether the one who asked for the task of the file TASK.json wants it to save and end."""
    return task.with_suffix(".stop").exists()


def is_end(event: Mapping[str, Any], asked: bool) -> bool:
    """Whether an event ends its task. One that was stopped and not by us (`asked`) goes on in another attempt."""
    return event.get("event") == "ended" and (asked or event.get("status") != "stopped")


def attempts(events: Path) -> int:
    """How often a task has been begun, by its events."""
    return sum(event.get("event") == "attempt" for event in read_lines(events)[0])


def add_line(path: Path, content: Mapping[str, Any]) -> None:
    """One more JSON object on a line of its own, on disk when this returns. Raises OSError.

    Appended, not renamed into place: a network's file system shows another machine what is new in a file at its next
    look, a new file under an old name only after a while.
    """
    line = json.dumps(content, default=str).encode() + b"\n"
    with path.open("ab+") as file:
        if file.tell():  # a killed process may have left its last line torn
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """(the JSON objects on the whole lines from byte `start` on, the byte after them); what is damaged is left out."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            whole, newline, _ = file.read().rpartition(b"\n")
    except OSError:
        return [], start
    rows = []
    for line in whole.splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)], start + len(whole) + len(newline)
