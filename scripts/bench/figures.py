"""From what was seen of runs to ratios, and the table of them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.bench.cases import Case


@dataclass
class Run:
    """One run of one side. ends: seconds at which each step ended. held_out: loss after so many steps (0: the base)."""

    side: str
    pair: int
    tokens: list[int]  # real ones, of each step
    ends: list[float]
    peak_bytes: int
    seconds: float  # of the whole process
    rate: float  # real tokens a second
    losses: list[float] = field(default_factory=list)  # of each step, as the program says
    held_out: dict[int, float] = field(default_factory=dict)


def rate(tokens: Sequence[int], ends: Sequence[float], first: int, saved: Sequence[int] = ()) -> float:
    """Real tokens a second from step `first` (counted from 0) on, each step timed from the end of the one before.

    saved: after how many steps a checkpoint was written; the step that follows is left out, for its time holds that.
    """
    counted = [i for i in range(max(first, 1), len(ends)) if i not in saved]
    if not counted:
        raise ValueError(f"{len(ends)} steps: too few to time any")
    return sum(tokens[i] for i in counted) / sum(ends[i] - ends[i - 1] for i in counted)


def steps_to(level: float, held_out: dict[int, float]) -> float:
    """After how many steps the held-out loss came down to `level`, on straight lines between what is known.

    The last step known where it did not.
    """
    known = sorted(held_out.items())
    for (a, high), (b, low) in itertools.pairwise(known):
        if high <= level:
            return float(a)
        if low <= level:
            return a + (b - a) * (high - level) / (high - low)
    return float(known[-1][0])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(case: Case, ours: Sequence[Run], other: Sequence[Run]) -> dict[str, Any]:
    """The case's figures: ratios of ours to the other by pairs."""
    pairs = list(zip(ours, other, strict=True))
    found: dict[str, Any] = {
        "tokens_per_s": [statistics.median(r.rate for r in side) for side in (ours, other)],
        "peak_bytes": [statistics.median(r.peak_bytes for r in side) for side in (ours, other)],
        "speed": spread([a.rate / b.rate for a, b in pairs]),
        "memory": spread([a.peak_bytes / b.peak_bytes for a, b in pairs]),
    }
    judged = [(a, b) for a, b in pairs if a.held_out and b.held_out]
    return found | _quality(*judged[0], speeds=found["tokens_per_s"]) if judged else found


def _quality(ours: Run, other: Run, speeds: Sequence[float]) -> dict[str, Any]:
    """Held-out losses after the same tokens, and the seconds of training to the higher of them."""
    last = [run.held_out[max(run.held_out)] for run in (ours, other)]
    level, mean = max(last), statistics.mean(ours.tokens)
    took = [steps_to(level, r.held_out) * mean / speed for r, speed in zip((ours, other), speeds, strict=True)]
    return {
        "held_out": last,
        "held_out_difference": last[0] / last[1] - 1,
        "level": level,
        "seconds_to_level": took,
        "time": took[0] / took[1],
    }


_HEAD: tuple[str, ...] = (
    "case",
    "tokens/s",
    "against",
    "ratio",
    "peak GB",
    "against",
    "ratio",
    "held-out",
    "against",
    "differ",
)
_HEAD += ("s to loss", "against", "ratio")


def table(found: dict[str, dict[str, Any]]) -> str:
    """The summaries of cases as a table in Markdown: medians, and of ratios lowest and highest as well."""
    rows = [_HEAD, *(_row(name, figures) for name, figures in found.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    speeds, sizes = figures["tokens_per_s"], figures["peak_bytes"]
    cells = [name, f"{speeds[0]:.0f}", f"{speeds[1]:.0f}", times(figures["speed"])]
    cells += [f"{sizes[0] / 1e9:.2f}", f"{sizes[1] / 1e9:.2f}", times(figures["memory"])]
    if "held_out" not in figures:
        return (*cells, *[""] * (len(_HEAD) - len(cells)))
    held, took = figures["held_out"], figures["seconds_to_level"]
    cells += [f"{held[0]:.4f}", f"{held[1]:.4f}", f"{figures['held_out_difference']:+.2%}"]
    return (*cells, f"{took[0]:.1f}", f"{took[1]:.1f}", f"{figures['time']:.2f}")


def times(found: dict[str, float]) -> str:
    """A ratio with its spread: "4.03 (3.95–4.10)"."""
    return f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})"
