"""What happened within the runs: loss from step to step, the rank that was used, the time of a generated token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from ftrun.report.plots import marks
from ftrun.report.plots.ink import MUTED, SERIES, Drawing, Sheet
from ftrun.report.plots.looks import Looks, swatches
from ftrun.report.plots.scales import cut, scale_of, swept_axis
from ftrun.report.study_rows import FIGURES, Row, choices, label, numbers, ranked, varied

_POINTS = 40  # of a curve: more steps than these are taken together
_DOTTED = 12  # points of a curve that are few enough to be marked
_BARS = 12  # runs whose latency is shown
_LATENCIES = {"base_ms": MUTED, "unmerged_ms": SERIES[1], "merged_ms": SERIES[0]}

Point = tuple[float, float]


def training(rows: Sequence[Row], objective: str) -> Drawing | None:
    """The training loss of every run; None where no run has two steps."""
    longest = max((len(row.curve) for row in rows), default=0)
    together = math.ceil(longest / _POINTS)
    each = f"Each point is the mean of {together} steps. " if together > 1 else ""
    return _curves(rows, objective, lambda row: _means(row.curve, together), "Training loss", each)


def held_out(rows: Sequence[Row], objective: str) -> Drawing | None:
    """The held-out loss of every run while it trained; None where no run has two evaluations."""
    return _curves(rows, objective, lambda row: row.evals, "Held-out loss while training", "")


def _means(points: Sequence[Point], together: int) -> list[Point]:
    """Neighbours as one point, at their mean step."""
    parts = [points[at : at + together] for at in range(0, len(points), max(1, together))]
    return [(fmean(step for step, _ in part), fmean(loss for _, loss in part)) for part in parts]


def _curves(
    rows: Sequence[Row], objective: str, of: Callable[[Row], Sequence[Point]], title: str, each: str
) -> Drawing | None:
    there = [(row, points) for row in rows if len(points := of(row)) > 1]
    if not there:
        return None
    seen = [loss for row, points in there if row.done for _, loss in points]
    seen = seen or [loss for _, points in there for _, loss in points]
    best = next(iter(ranked([row for row, _ in there], objective)), None)
    sheet = Sheet(330)
    room = 0.04 * (max(seen) - min(seen)) or 0.1
    low, high = min(seen) - room, max(seen) + room
    looks, many = Looks(rows, objective), len(there) > 8
    drawn, hidden = list[list[Point]](), 0
    for row, points in sorted(there, key=lambda pair: pair[0] is best, reverse=True):
        ys = [min(max(loss, low - 9 * room), high + 9 * room) for _, loss in points]  # out of sight, not out of range
        wide, alpha = (2.8, 1.0) if row is best else (1.2, 0.6) if many else (1.6, 0.85)
        xs, colour, dot = [step for step, _ in points], looks.of(row).colour, "o" if len(points) <= _DOTTED else ""
        drawn.append([*zip(xs, ys, strict=True)])
        covers = any(_close(drawn[-1], other, 0.005 * (high - low)) for other in drawn[:-1])
        style = (0, (3, 3)) if covers else "-"  # what lies beneath shows through
        hidden += covers
        (line,) = sheet.axes.plot(
            xs, ys, color=colour, linewidth=wide, linestyle=style, alpha=alpha, marker=dot, markersize=4, zorder=2
        )
        sheet.hint(line, marks.told(row, rows, objective))
    _frame(sheet, low, high)
    caption = f"{each}{'The thick line is the best run. ' if best and len(there) > 1 else ''}"
    caption += "A dashed line lies on another run's." if hidden else ""
    told = "; ".join(
        f"{label(row, varied(rows))}: {points[0][1]:.3f} to {points[-1][1]:.3f}" for row, points in there[:24]
    )
    name = title.lower().replace(" ", "-")
    return sheet.finish(name, title, caption.strip(), looks.hues(), f"First to last: {told}.")


def _close(one: Sequence[Point], other: Sequence[Point], within: float) -> bool:
    """Whether two curves cannot be told from each other."""
    if [step for step, _ in one] != [step for step, _ in other]:
        return False
    return all(abs(a - b) <= within for (_, a), (_, b) in zip(one, other, strict=True))


def _frame(sheet: Sheet, low: float, high: float) -> None:
    from matplotlib.ticker import MaxNLocator

    sheet.axes.set_ylim(low, high)
    sheet.axes.margins(x=0.02)
    sheet.axes.grid(visible=False, axis="x")
    sheet.axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    sheet.axes.set_xlabel("step")
    sheet.axes.set_title("loss, nats a token (lower is better)")


def ranks(rows: Sequence[Row], objective: str) -> Drawing | None:
    """The effective rank of what was learnt against the rank that it could have; None where no run has both."""
    key, figure = "rank", "effective_rank"
    there = [row for row in rows if row.done and key in row.values and row.figure(figure) is not None]
    places = numbers(choices(there, key))
    if len(places) < 2:
        return None
    sheet, looks = Sheet(330), Looks(rows, objective, without=[key])
    swept_axis(sheet.axes, places, key)
    ends = min(places.values()), max(places.values())
    sheet.axes.plot(ends, ends, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    heights = [row.figure(figure) or 0.0 for row in there]
    if scale_of([*places.values()]) != "linear" and min(heights) > 0:
        _powers(sheet, min(heights), max([*heights, ends[1]]))
    for row, height in zip(there, heights, strict=True):
        words = marks.told(row, rows, figure, objective)
        marks.point(sheet, sheet.axes, places[row.values[key]], height, looks.of(row), words)
    sheet.axes.set_title(FIGURES[figure].label)
    told = ", ".join(f"{label(row, varied(rows))}: {row.shown(figure)}" for row in there[:24])
    caption = "The dashed line is the rank itself: what lies far below it did not need it."
    return sheet.finish("effective-rank", "Effective rank against rank", caption, looks.legend(), f"{told}.")


def _powers(sheet: Sheet, low: float, high: float) -> None:
    """A y axis of powers of two."""
    from matplotlib.ticker import NullLocator

    sheet.axes.set_yscale("log", base=2)
    ends = math.floor(math.log2(low)), math.ceil(math.log2(high))
    sheet.axes.set_ylim(2.0 ** (ends[0] - 0.2), 2.0 ** (ends[1] + 0.2))
    step = math.ceil((ends[1] - ends[0] + 1) / 8)
    powers = [2.0**power for power in range(ends[0], ends[1] + 1, step)]
    sheet.axes.set_yticks(powers, [f"{power:g}" for power in powers])
    sheet.axes.yaxis.set_minor_locator(NullLocator())


def latency(rows: Sequence[Row], objective: str) -> Drawing | None:
    """Milliseconds a generated token: the base's, with the adapter beside it, with the adapter merged into it."""
    order = [*ranked(rows, objective), *rows]
    timed = [row for row in order if row.status != "same" and any(row.figure(key) is not None for key in _LATENCIES)]
    there = list({id(row): row for row in timed}.values())
    shown = there[:_BARS]
    if not shown:
        return None
    kinds = [key for key in _LATENCIES if any(row.figure(key) is not None for row in shown)]
    sheet = Sheet(80 + len(shown) * (16 + 12 * len(kinds)))
    for line, row in enumerate(shown):
        _bars(sheet, line, row, kinds)
    sheet.axes.set_ylim(len(shown) - 0.5, -0.5)
    sheet.axes.set_yticks(range(len(shown)), [cut(_name(row, rows), 30) for row in shown])
    sheet.axes.grid(visible=False, axis="y")
    sheet.axes.margins(x=0.12)
    sheet.axes.set_xlabel("milliseconds a generated token (lower is better)")
    names = [(FIGURES[key].label.partition(" ")[0], _LATENCIES[key]) for key in kinds]
    caption = f"The best {len(shown)} of {len(there)} runs." if len(there) > len(shown) else ""
    told = "; ".join(f"{_name(row, rows)}: {', '.join(row.shown(k) for k in kinds if row.shown(k))}" for row in shown)
    return sheet.finish("latency", "Time of a generated token", caption, swatches(names), f"{told}.")


def _bars(sheet: Sheet, line: int, row: Row, kinds: Sequence[str]) -> None:
    thick = 0.76 / len(kinds)
    for number, key in enumerate(kinds):
        value = row.figure(key)
        if value is not None:
            at = line - 0.38 + thick * (number + 0.5)
            (bar,) = sheet.axes.barh(at, value, 0.86 * thick, color=_LATENCIES[key], zorder=2)
            sheet.hint(bar, f"{FIGURES[key].label}: {row.shown(key)}")
            sheet.axes.annotate(
                f"{value:,.1f}", (value, at), (5, 0), textcoords="offset points", va="center", fontsize=10, color=MUTED
            )


def _name(row: Row, rows: Sequence[Row]) -> str:
    return " ".join(row.values[key] for key in varied(rows) if key in row.values) or f"run {row.number}"
