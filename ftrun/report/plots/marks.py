"""Marks that the plots share: a run's point, the ring around the best, runs that came to nothing, labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftrun.report.plots.ink import INK, MUTED, PAPER, SMALL, Sheet
from ftrun.report.plots.looks import Look
from ftrun.report.plots.scales import cut
from ftrun.report.study_rows import FIGURES, Row, label, varied

# of a point, CSS pixels: so that all look equally large
_SIZES = {"o": 8.0, "s": 7.2, "^": 9.2, "v": 9.2, "D": 6.8, "P": 9.4}
_LABELS = 8  # in one plot
_PLACES = ((1, -1), (-1, 1), (-1, -1), (1, 1), (1, 0), (-1, 0), (0, -1), (0, 1))  # of a name beside its point


def told(row: Row, rows: Sequence[Row], *keys: str) -> str:
    """What the pointer shows over a run: its number, setting and figures."""
    figures = [f"{FIGURES[key].label} {row.shown(key)}" for key in keys if row.shown(key)]
    return f"{row.name}: {', '.join([label(row, varied(rows)), *figures])}"


def point(sheet: Sheet, axes: Any, x: float, y: float, look: Look, words: str, *, faint: bool = False) -> None:
    """One run. faint: one that others beat."""
    (mark,) = axes.plot(
        [x],
        [y],
        linestyle="none",
        marker=look.marker,
        markersize=_SIZES[look.marker],
        color=look.colour,
        markeredgecolor=PAPER,
        markeredgewidth=1,
        alpha=0.45 if faint else 1.0,
        clip_on=False,
        zorder=3,
    )
    sheet.hint(mark, words)


def beyond(sheet: Sheet, axes: Any, x: float, y: float, look: Look, words: str) -> None:
    """A run whose value lies off the scale, at the scale's edge (x, y): hollow."""
    (mark,) = axes.plot(
        [x],
        [y],
        linestyle="none",
        marker=look.marker,
        markersize=_SIZES[look.marker],
        markerfacecolor=PAPER,
        markeredgecolor=look.colour,
        markeredgewidth=1.5,
        clip_on=False,
        zorder=3,
    )
    sheet.hint(mark, words)


def ring(axes: Any, x: float, y: float) -> None:
    """Around the best run."""
    axes.plot([x], [y], "o", markersize=15, markerfacecolor="none", markeredgecolor=INK, clip_on=False, zorder=4)


def cross(sheet: Sheet, axes: Any, x: float, y: float, words: str) -> None:
    """A run without a value."""
    (mark,) = axes.plot([x], [y], "x", markersize=7, color=MUTED, markeredgewidth=1.6, clip_on=False, zorder=3)
    sheet.hint(mark, words)


def name_points(
    sheet: Sheet, named: Sequence[tuple[float, float, str]], others: Sequence[tuple[float, float]], free: int
) -> None:
    """Write beside points what they are, the first ones first, as far as there is room between points and names.

    named: (x, y, text) of those to name; others: points that no name may cover, the ringed one first; free: the side
    that is tried first, 1 for right, -1 for left.
    """
    from matplotlib.transforms import Bbox

    sheet.settle()
    renderer = sheet.canvas.get_renderer()
    frame = sheet.axes.get_window_extent(renderer).padded(4)
    centres = sheet.axes.transData.transform([(x, y) for x, y, *_ in (*named, *others)])
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in centres]
    for x, y, text in named[:_LABELS]:
        for across, up in _PLACES:
            far = 10 if (x, y) == others[0] else 7
            words = _beside(sheet.axes, x, y, cut(text, 32), across * free * far, up * far)
            box = words.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(one) for one in taken):
                taken.append(box)
                break
            words.remove()


def _beside(axes: Any, x: float, y: float, text: str, across: int, up: int) -> Any:
    words = axes.annotate(
        text,
        (x, y),
        xytext=(across, up),
        textcoords="offset points",
        ha="left" if across > 0 else "right" if across else "center",
        va="bottom" if up > 0 else "top" if up else "center",
        fontsize=SMALL,
        color=INK,
        zorder=5,
    )
    words.set_in_layout(False)
    return words
