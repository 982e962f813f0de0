"""A finished run's card: what the run's folder holds, as the README.md beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from ftrun.report.card import Facts, card
from ftrun.runs import aside, job_file, read_json

FILE = "README.md"


def facts_of(run: Path, place: str | None = None, whole: bool = False) -> Facts:
    """What a run's folder says of it. place: where its files are loaded from; whole: they are its merged model."""
    adapter = run / "adapter" / "adapter_config.json"
    trained_in_full = not adapter.is_file()
    config = {} if trained_in_full or whole else read_json(adapter) or {}
    job = yaml.safe_load(job_file(run).read_text(encoding="utf-8"))
    result = read_json(run / "result.json") or {}
    place = place or ("model" if trained_in_full else "adapter")
    return Facts(job, result, config, place, run.resolve().name, whole or trained_in_full)


def write_card(run: Path, say: Callable[[str], None]) -> None:
    """README.md into the run's folder; where it cannot be written it is said, and the run stands all the same."""
    try:
        with aside(run / FILE) as beside:
            beside.write_text(card(facts_of(run)), encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a card is not worth a finished run
        say(f"warning: {run / FILE}: cannot be written: {getattr(error, 'strerror', None) or error}")
