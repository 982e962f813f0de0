"""What a study's search has found, in words: kept in the folder, for whoever makes the page again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftrun.errors import UserError
from ftrun.runs import read_json, write_json
from ftrun.studies import ledger

_NAME = "found.json"


def keep(folder: Path, events: Sequence[Mapping[str, Any]], sentences: Sequence[str]) -> None:
    """What the search says, beside how many trials had ended by then. Raises OSError."""
    write_json(folder / _NAME, {"ended": _ended(events), "sentences": list(sentences)})


def kept(folder: Path) -> list[str]:
    """The search's sentences; none where trials have ended since. Raises UserError on a damaged file."""
    found = read_json(folder / _NAME)
    if found is None:
        return []
    sentences = found.get("sentences") if isinstance(found, dict) else None
    if not isinstance(sentences, list) or not all(isinstance(one, str) for one in sentences):
        raise UserError(f"{folder / _NAME}: damaged: expected an object whose sentences are a list of texts")
    return sentences if found.get("ended") == _ended(ledger.read(folder / "ledger.jsonl")) else []


def _ended(events: Sequence[Mapping[str, Any]]) -> int:
    return sum(event["event"] == "end" for event in events)
