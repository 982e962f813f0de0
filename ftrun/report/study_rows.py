"""What the rows of a study hold: figures by key, keys that vary, the best run, what each key does.

A row is a plain object: number, values (swept key -> value as typed), status, reason, note, same_as, out, figures,
curve and evals ([step, loss] pairs), links (file -> address) and command. Any of them may be missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any, TypeGuard

from ftrun.errors import UserError, unknown
from ftrun.report.plan_text import size

NEAR = 0.01  # of the best value: about as good
NOISE = "seed"  # a key whose values are repetitions of one setting
# figures whose deviation over the seeds is shown
_SPREAD = ("loss", "perplexity", "retention", "train_loss", "rung_loss", "effective_rank", "tokens_per_s")
_HUGE = 1e30  # a figure beyond it comes from a broken run; no axis and no comparison takes it


@dataclass(frozen=True)
class Figure:
    """One figure of a run: its name in words, how a value is written, its unit on an axis.

    lower: whether lower is better; None where a study cannot be judged by it. unit: bytes, count, ms, s or "".
    """

    label: str
    write: Callable[[float], str]
    lower: bool | None = None
    unit: str = ""


def duration(seconds: float) -> str:
    """Seconds in words: 4.2 s, 3:05, 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


_LOSS, _WHOLE, _MS = "{:.4f}".format, "{:,.0f}".format, "{:,.2f} ms".format

# in the order of the tables' columns: where there is little room, the first ones are shown
FIGURES = {
    "loss": Figure("held-out loss", _LOSS, True),
    "loss_before": Figure("base's loss", _LOSS),
    "retention": Figure("rise on base text", "{:+.4f}".format, True),
    "peak_bytes": Figure("peak memory", size, True, "bytes"),
    "tokens_per_s": Figure("tokens/s", _WHOLE, False),
    "trainable_params": Figure("trained parameters", _WHOLE, True, "count"),
    "seconds": Figure("time", duration, True, "s"),
    "effective_rank": Figure("effective rank", "{:.1f}".format),
    "unmerged_ms": Figure("unmerged token", _MS, True, "ms"),
    "merged_ms": Figure("merged token", _MS, True, "ms"),
    "base_ms": Figure("base token", _MS, None, "ms"),
    "adapter_bytes": Figure("on disk", size, True, "bytes"),
    "perplexity": Figure("perplexity", "{:,.2f}".format, True),
    "planned_peak_bytes": Figure("planned peak", size, True, "bytes"),
    "steps": Figure("steps done", _WHOLE, None, "count"),
    "total_params": Figure("all parameters", _WHOLE, None, "count"),
    "train_loss": Figure("last training loss", _LOSS, True),
    "rung_loss": Figure("loss when stopped", _LOSS, True),
    "process_bytes": Figure("process", size, True, "bytes"),
    "seeds": Figure("seeds", _WHOLE),
    "merges": Figure("merges", "{:.0f}".format),
}

# status -> in words, of one run and of several
STATUSES = {
    "finished": ("done", "done"),
    "failed": ("failed", "failed"),
    "diverged": ("diverged", "diverged"),
    "pruned": ("stopped early", "stopped early"),
    "does_not_fit": ("does not fit", "do not fit"),
    "invalid": ("invalid", "invalid"),
    "interrupted": ("interrupted", "interrupted"),
    "running": ("running", "running"),
    "waiting": ("waiting", "waiting"),
    "same": ("the same as another", "the same as others"),
}


@dataclass(frozen=True)
class Row:
    """A row as the tables and plots use it. One that is the same job as another carries that one's figures.

    of: the numbers of the runs that it stands for, where it is the mean of several seeds; spread: their figures'
    standard deviations.
    """

    number: int
    values: Mapping[str, str]
    status: str
    reason: str
    same_as: int | None
    ended: str  # the status; of one that is the same as another that one's
    figures: Mapping[str, Any]
    curve: tuple[tuple[float, float], ...]
    evals: tuple[tuple[float, float], ...]
    note: str = ""
    links: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    of: tuple[int, ...] = ()
    spread: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its number, or those of the runs that it is the mean of."""
        return ", ".join(map(str, self.of or (self.number,)))

    @property
    def done(self) -> bool:
        """It ended well."""
        return self.ended == "finished"

    @property
    def open(self) -> bool:
        """It may yet end well."""
        return self.ended in ("running", "waiting")

    def figure(self, key: str) -> float | None:
        """The figure where it is a number that can be compared and drawn, else None."""
        value = self.figures.get(key)
        return float(value) if _sound(value) else None

    def shown(self, key: str) -> str:
        """The figure as people read it; empty where there is none."""
        value = self.figures.get(key)
        if value is None or isinstance(value, str):
            return plain(value or "")
        if isinstance(value, bool):
            return "yes" if value else "no"
        if not _sound(value) or abs(value) >= 1e15:
            return f"{value:.3g}" if isinstance(value, int | float) else plain(str(value))
        if key not in FIGURES:
            return f"{value:,.6g}"
        write = FIGURES[key].write
        return write(value) + (f" ± {write(self.spread[key]).lstrip('+')}" if key in self.spread else "")

    @property
    def words(self) -> str:
        """The status in words: done, failed, the same as run 3."""
        if self.status == "same" and self.same_as is not None:
            return f"the same as {self.same_as}"
        return STATUSES[self.status][0] if self.status in STATUSES else plain(self.status)


def read(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows, in order."""
    there = list(rows)
    by_number = {row.get("number"): row for row in there}
    return [_read(row, index, _original(row, by_number)) for index, row in enumerate(there, start=1)]


def plain(text: str) -> str:
    """Text in one line of characters that can be printed: none that break a terminal, XML or UTF-8."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _read(row: Mapping[str, Any], index: int, original: Mapping[str, Any]) -> Row:
    return Row(
        number=row.get("number", index),
        values={str(key): plain(_typed(value)) for key, value in (row.get("values") or {}).items()},
        status=str(row.get("status", "")),
        reason=plain(str(row.get("reason") or "")),
        same_as=row.get("same_as"),
        ended=str(original.get("status", "")),
        figures=original.get("figures") or {},
        curve=_points(row.get("curve")),
        evals=_points(row.get("evals")),
        note=plain(str(row.get("note") or "")),
        links=row.get("links") or {},
        command=plain(str(row.get("command") or "")),
    )


def _original(row: Mapping[str, Any], by_number: Mapping[Any, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row that ran in the place of one that is the same job; the row itself where none did."""
    seen = row
    for _ in by_number:
        if seen.get("status") != "same" or seen.get("same_as") not in by_number:
            return seen
        seen = by_number[seen["same_as"]]
    return row


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _sound(value: Any) -> TypeGuard[float]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < _HUGE  # False for NaN too


def _points(pairs: Iterable[Sequence[Any]] | None) -> tuple[tuple[float, float], ...]:
    return tuple((float(step), float(loss)) for step, loss in pairs or () if _sound(step) and _sound(loss))


def folded(rows: Sequence[Row]) -> list[Row]:
    """Runs that differ in their seed alone as one: the means of those that are done, with their deviations."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        setting = tuple(sorted((k, v) for k, v in row.values.items() if k != NOISE))
        groups.setdefault(setting if NOISE in row.values else (row.number,), []).append(row)
    if all(len(group) == 1 for group in groups.values()):
        return list(rows)
    return [_mean(group) for group in groups.values()]


def _mean(group: Sequence[Row]) -> Row:
    there = [row for row in group if row.status != "same"] or group
    done = [row for row in there if row.done]
    first = (done or there)[0]
    lost = [f"{row.number} {row.words}{f': {row.reason}' if row.reason else ''}" for row in there if not row.done]
    got: dict[str, list[float]] = {}
    for row in done:
        for key in row.figures:
            if (value := row.figure(key)) is not None:
                got.setdefault(key, []).append(value)
    means = {key: fmean(values) for key, values in got.items()}
    spread = {key: stdev(got[key]) for key in _SPREAD if len(got.get(key, ())) > 1}
    return replace(
        first,
        values={key: value for key, value in first.values.items() if key != NOISE},
        reason="; ".join(lost) if len(there) > 1 and done else first.reason,
        figures={**first.figures, **means, "seeds": len(done)} if done else first.figures,
        of=tuple(row.number for row in there),
        spread=spread,
        note="; ".join(dict.fromkeys(row.note for row in there if row.note)),
    )


def keys(rows: Sequence[Row]) -> list[str]:
    """The swept keys, in the order in which they were typed."""
    return list(dict.fromkeys(key for row in rows for key in row.values))


def varied(rows: Sequence[Row]) -> list[str]:
    """The swept keys that differ between rows; all of them where there is one row."""
    return [k for k in keys(rows) if len(rows) < 2 or len({row.values.get(k) for row in rows}) > 1]


def choices(rows: Sequence[Row], key: str) -> list[str]:
    """The values of a key: in the order of numbers where all are, else as they were typed."""
    found = list(dict.fromkeys(row.values[key] for row in rows if key in row.values))
    places = numbers(found)
    return sorted(found, key=lambda value: places[value]) if places else found


def numbers(values: Sequence[str]) -> dict[str, float]:
    """Value as typed -> its number, where every one is a number; else empty."""
    found = {}
    for value in values:
        try:
            found[value] = float(value)
        except ValueError:
            return {}
    return found if all(map(_sound, found.values())) else {}


def judged(objective: str) -> Figure:
    """The figure that a study is judged by. Raises UserError where no study can be."""
    known = [key for key, figure in FIGURES.items() if figure.lower is not None]
    if objective not in known:
        raise UserError(unknown("objective", objective, known, listed=len(known)))
    return FIGURES[objective]


def cost(key: str, value: float) -> float:
    """The value, turned so that lower is better."""
    return -value if FIGURES[key].lower is False else value


def ranked(rows: Sequence[Row], objective: str) -> list[Row]:
    """The rows that are done and have the figure, best first; a job's original before those that are the same."""
    judged(objective)
    found = [(cost(objective, value), row) for row in rows if row.done and (value := row.figure(objective)) is not None]
    return [row for _, row in sorted(found, key=lambda pair: (pair[0], pair[1].status == "same", pair[1].number))]


def arranged(rows: Sequence[Row], objective: str) -> list[Row]:
    """Best first; those that cannot be judged after them, in their order."""
    best = ranked(rows, objective)
    known = {id(row) for row in best}
    return [*best, *(row for row in rows if id(row) not in known)]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Pareto: the points that no other beats in one and equals or beats in the other; lower is better in both."""
    found: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not found or points[index][1] < points[found[-1]][1]:
            found.append(index)
    return found


def smallest(rows: Sequence[Row], objective: str) -> Row | None:
    """Of the runs within NEAR of the best the one that trains the fewest parameters, then takes the least memory."""
    best = ranked(rows, objective)
    if not best:
        return None
    value = cost(objective, best[0].figure(objective) or 0.0)
    near = [row for row in best if cost(objective, row.figure(objective) or 0.0) <= value + NEAR * abs(value)]
    return min(near, key=lambda row: [_or_most(row.figure(k)) for k in ("trainable_params", "peak_bytes")])


def _or_most(value: float | None) -> float:
    return math.inf if value is None else value


def effects(rows: Sequence[Row], objective: str) -> dict[str, float]:
    """Varied key -> what its worst value costs while the others are at their best, in the objective's unit; most first.

    Keys with one value among the runs that are done are left out.
    """
    best = ranked(rows, objective)
    found = {}
    for key in varied(rows):
        at: dict[str | None, float] = {}
        for row in best:
            at.setdefault(row.values.get(key), row.figure(objective) or 0.0)
        if len(at) > 1:
            found[key] = max(at.values()) - min(at.values())
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def label(row: Row, shown: Sequence[str]) -> str:
    """The row's setting as it was typed: rank=16 layers=all."""
    return " ".join(f"{key}={row.values[key]}" for key in shown if key in row.values) or f"run {row.name}"
