"""Planned against measured peak memory, a pair of bars for each run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ftrun.report.plots.ink import MUTED, SERIES, Drawing, Sheet
from ftrun.report.plots.looks import swatches
from ftrun.report.plots.scales import cut, unit_of
from ftrun.report.study_rows import FIGURES, Row, arranged, label, varied

_RUNS = 24  # with more, the first of the table are drawn
_KINDS = {"planned_peak_bytes": ("planned", MUTED), "peak_bytes": ("measured", SERIES[0])}


def peaks(rows: Sequence[Row], objective: str) -> Drawing | None:
    """The peaks in the table's order; None where no run has both."""
    there = [row for row in arranged(rows, objective) if row.status != "same" and _both(row)]
    if not there:
        return None
    shown = there[:_RUNS]
    divisor, unit = unit_of("peak_bytes", max(row.figure(key) or 0.0 for row in shown for key in _KINDS))
    sheet = Sheet(84 + 34 * len(shown))
    for line, row in enumerate(shown):
        for number, key in enumerate(_KINDS):
            at, value = line - 0.17 + 0.34 * number, (row.figure(key) or 0.0) / divisor
            (bar,) = sheet.axes.barh(at, value, 0.31, color=_KINDS[key][1], zorder=2)
            sheet.hint(bar, f"{row.name}: {_name(row, rows)}, {FIGURES[key].label} {row.shown(key)}")
        end = max(row.figure(key) or 0.0 for key in _KINDS) / divisor
        sheet.axes.annotate(
            f"{off(row):+.3%}".replace("-0.000%", "0.000%").replace("+0.000%", "0.000%"),
            (end, line),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            color=MUTED,
        )
    sheet.axes.set_ylim(len(shown) - 0.5, -0.5)
    sheet.axes.set_yticks(range(len(shown)), [cut(_name(row, rows), 30) for row in shown])
    sheet.axes.grid(visible=False, axis="y")
    sheet.axes.margins(x=0.16)
    sheet.axes.set_xlabel(f"peak memory{unit}")
    return sheet.finish(
        "peaks",
        "Planned and measured peak memory",
        _caption(there, shown),
        swatches([*_KINDS.values()]),
        _told(shown, rows),
    )


def off(row: Row) -> float:
    """How far above the measured peak the plan is, as a part of it."""
    planned, measured = (row.figure(key) or 0.0 for key in _KINDS)
    return planned / measured - 1


def _both(row: Row) -> bool:
    """A run that was not measured carries its plan as its peak."""
    planned, measured = (row.figure(key) for key in _KINDS)
    return planned is not None and bool(measured) and planned != measured


def _caption(there: Sequence[Row], shown: Sequence[Row]) -> str:
    few = f"The first {len(shown)} of {len(there)} runs. " if len(there) > len(shown) else ""
    errors = [abs(off(row)) for row in there]
    sizes = f"either way {median(errors):.3%} in the median, {max(errors):.3%} at most"
    return f"{few}Beside the bars: how far the plan lies above the measured peak (−: below it); {sizes}."


def _told(shown: Sequence[Row], rows: Sequence[Row]) -> str:
    parts = (f"{_name(r, rows)}: {r.shown('planned_peak_bytes')} planned, {r.shown('peak_bytes')}" for r in shown)
    return f"{'; '.join(parts)} measured."


def _name(row: Row, rows: Sequence[Row]) -> str:
    return " ".join(row.values[key] for key in varied(rows) if key in row.values) or label(row, ())
