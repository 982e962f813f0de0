"""What a study found, in sentences: for the terminal and for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ftrun.report.study_rows import (
    FIGURES,
    NEAR,
    NOISE,
    STATUSES,
    Row,
    effects,
    folded,
    judged,
    label,
    plain,
    ranked,
    read,
    smallest,
    varied,
)


def summary(rows: Sequence[Mapping[str, Any]], objective: str = "loss") -> list[str]:
    """Sentences: how many runs are done, the best, the smallest about as good, which key matters most.

    Raises UserError where a study cannot be judged by the objective.
    """
    every, figure = read(rows), judged(objective)
    there = folded(every)
    best = next(iter(ranked(there, objective)), None)
    if best is None:
        return [_counts(every), f"No run has a {figure.label} to compare."]
    return [_counts(every), _best(there, best, objective), *_smallest(there, best, objective), *_keys(there, objective)]


def _counts(rows: Sequence[Row]) -> str:
    if not rows:
        return "No runs."
    there = Counter(row.status for row in rows)
    parts = [f"{there.pop('finished', 0)} of {len(rows)} done"]
    for status in (*STATUSES, *there):
        if count := there.pop(status, 0):
            parts.append(f"{count} {STATUSES.get(status, (plain(status),) * 2)[count > 1]}")
    return ", ".join(parts) + "."


def _best(rows: Sequence[Row], row: Row, objective: str) -> str:
    base = f" (base {row.shown('loss_before')})" if objective == "loss" and row.shown("loss_before") else ""
    lead = "Best: " if len(rows) > 1 else ""
    needs = f"{base}{_needs(row, objective)}"
    return f"{lead}{label(row, varied(rows))}, {FIGURES[objective].label} {row.shown(objective)}{needs}."


def _needs(row: Row, objective: str) -> str:
    """What the run takes: parameters that train, memory; what it is judged by has been told."""
    peak, trained = (row.shown(key) if key != objective else "" for key in ("peak_bytes", "trainable_params"))
    return (f", at {peak}" if peak else "") + (f", {trained} parameters trained" if trained else "")


def _smallest(rows: Sequence[Row], best: Row, objective: str) -> list[str]:
    row = smallest(rows, objective)
    if row is None or len(ranked(rows, objective)) < 2:
        return []
    if row.number == best.number:
        return [f"No smaller run comes within {NEAR:.0%} of it."]
    words = f"{label(row, varied(rows))}, {FIGURES[objective].label} {row.shown(objective)}{_needs(row, objective)}"
    return [f"The smallest within {NEAR:.0%} of it: {words}."]


def _keys(rows: Sequence[Row], objective: str) -> list[str]:
    """What each key's worst value costs, where several can be told apart."""
    found = {key: loss for key, loss in effects(rows, objective).items() if key != NOISE}
    if len(found) < 2:
        return []
    figure = FIGURES[objective]
    (first, most), *others = _told_apart(rows, found, objective)
    if not others:
        return []
    rest = ", ".join(f"{key} {figure.write(loss).lstrip('+')}" for key, loss in others)
    return [
        f"Most depends on {first}: with all else at its best, its worst value costs {figure.write(most).lstrip('+')} "
        f"of {figure.label}; {rest}."
    ]


def _told_apart(rows: Sequence[Row], effects: Mapping[str, float], objective: str) -> list[tuple[str, float]]:
    """(key, its effect); keys that always change together, as between runs of different commands, as one."""
    there = ranked(rows, objective)
    together: dict[tuple[int, ...], list[str]] = {}
    for key in effects:
        values = [row.values.get(key) for row in there]
        together.setdefault(tuple(values.index(value) for value in values), []).append(key)
    return [(" with ".join(keys), effects[keys[0]]) for keys in together.values()]
