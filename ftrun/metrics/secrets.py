"""What may leave the machine: a job as flat values, with nothing in it that opens a door."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftrun.secrets import HIDDEN, KEYS, hide


def flat(job: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The job as "group.key": number, text or flag, with secrets hidden; lists as text, nulls left out."""
    made: dict[str, Any] = {}
    for key, value in job.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            made.update(flat(value, f"{name}."))
        elif value is not None:
            made[name] = HIDDEN if KEYS.search(str(key)) else _plain(value)
    return made


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float) else hide(str(value))
