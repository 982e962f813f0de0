"""The objective over two swept keys as a field of cells, the better the darker; a third key as fields side by side."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ftrun.report.plots.ink import HEAT, INK, MUTED, SMALL, WIDE, WIDTH, Drawing, Sheet
from ftrun.report.plots.marks import told
from ftrun.report.plots.scales import cut, window
from ftrun.report.study_rows import FIGURES, NOISE, Row, choices, cost, effects, label, numbers, ranked, varied

_FIELDS, _ACROSS, _DOWN = 4, 18, 16  # fields side by side; columns of all fields together; lines
_NARROW = 7  # columns that a figure beside another holds
_PAIR = ("layers", "targets")  # where a job is tuned: read together where both are swept
_PALE, _DARK = 0.06, 0.58  # of the colour over the paper: text reads on all between


def heat(rows: Sequence[Row], objective: str) -> Drawing | None:
    """The field of the best of each cell's runs; None where the grid of keys is not full, too large, or has no run."""
    swept = [key for key in varied(rows) if key != NOISE and len(choices(rows, key)) > 1]
    if len(swept) < 2 or not ranked(rows, objective):
        return None
    two = [*_PAIR] if set(_PAIR) <= set(swept) else [key for key in effects(rows, objective) if key in swept][:2]
    for chosen in (swept if len(swept) < 4 else two, two):
        if len(chosen) > 1 and _fits(rows, order := _order(rows, chosen)):
            return _Field(rows, order, objective).draw()
    return None


def _order(rows: Sequence[Row], chosen: Sequence[str]) -> list[str]:
    """The keys of the columns, of the lines and of the fields: layers and targets, numbers, many values first."""
    field = set(_PAIR) <= set(chosen)

    def place(key: str) -> tuple[Any, ...]:
        return (not (field and key in _PAIR), -bool(numbers(choices(rows, key))), -len(choices(rows, key)))

    return sorted(chosen, key=place)[:3]


def _fits(rows: Sequence[Row], order: Sequence[str]) -> bool:
    sizes = [*(len(choices(rows, key)) for key in order), 1][:3]
    there = {tuple(row.values.get(key) for key in order) for row in rows}
    full = set(itertools.product(*(choices(rows, key) for key in order))) <= there
    return full and sizes[2] <= _FIELDS and sizes[0] * sizes[2] <= _ACROSS and sizes[1] <= _DOWN


class _Field:
    """order: the keys of the columns, the lines and, where there are three, the fields."""

    def __init__(self, rows: Sequence[Row], order: Sequence[str], objective: str) -> None:
        self.rows, self.order, self.objective = rows, order, objective
        self.across, self.down = (choices(rows, key) for key in order[:2])
        self.fields = choices(rows, order[2]) if len(order) > 2 else [None]
        self.best = ranked(rows, objective)
        costs = [cost(objective, row.figure(objective) or 0.0) for row in self.best]
        self.low, self.high = min(costs), max(min(costs), min(max(costs), window(costs)[1]))

    def draw(self) -> Drawing:
        columns = len(self.across) * len(self.fields)
        width = WIDTH if columns <= _NARROW else WIDE
        sheet = Sheet(96 + len(self.down) * max(38, min(64, 200 / len(self.down))), width, len(self.fields))
        for axes, field in zip(sheet.panels, self.fields, strict=True):
            self._frame(axes, field)
            for (x, across), (y, down) in itertools.product(enumerate(self.across), enumerate(self.down)):
                self._cell(sheet, axes, x, y, {self.order[0]: across, self.order[1]: down}, field)
        sheet.axes.set_ylabel(cut(self.order[1], 40))
        return self._finish(sheet)

    def _frame(self, axes: Any, field: str | None) -> None:
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlim(-0.5, len(self.across) - 0.5)
        axes.set_ylim(len(self.down) - 0.5, -0.5)
        axes.set_xticks(range(len(self.across)), [cut(value, 14) for value in self.across])
        axes.set_yticks(range(len(self.down)), [cut(value) for value in self.down])
        axes.set_xlabel(cut(self.order[0], 40))
        if field is not None:
            axes.set_title(cut(f"{self.order[2]}={field}", 40))

    def _cell(self, sheet: Sheet, axes: Any, x: int, y: int, setting: dict[str, str], field: str | None) -> None:
        from matplotlib.patches import Rectangle

        wanted = setting if field is None else {**setting, self.order[2]: field}
        there = [row for row in self.rows if wanted.items() <= row.values.items()]
        row = next((row for row in self.best if wanted.items() <= row.values.items()), None)
        if row is None:
            words = axes.text(x, y, there[0].words, ha="center", va="center", fontsize=SMALL, color=MUTED)
            sheet.hint(words, f"{label(there[0], varied(self.rows))}: {there[0].words} {there[0].reason}".rstrip())
            return
        first = row is self.best[0]
        tile = Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=HEAT, alpha=self._depth(row), linewidth=0)
        axes.add_patch(tile)
        sheet.hint(tile, told(row, self.rows, self.objective))
        if first:
            axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, fill=False, edgecolor=INK, linewidth=1.6))
        weight = "bold" if first else "normal"
        words = replace(row, spread={}).shown(self.objective)
        axes.text(x, y, words, ha="center", va="center", fontsize=SMALL, color=INK, weight=weight)

    def _depth(self, row: Row) -> float:
        """The better, the more colour."""
        value = min(cost(self.objective, row.figure(self.objective) or 0.0), self.high)
        share = (self.high - value) / (self.high - self.low) if self.high > self.low else 1.0
        return round(_PALE + (_DARK - _PALE) * share, 3)

    def _finish(self, sheet: Sheet) -> Drawing:
        figure = FIGURES[self.objective]
        title = f"{figure.label[0].upper()}{figure.label[1:]} over {' and '.join(sorted(self.order[:2]))}"
        cells = len(self.across) * len(self.down) * len(self.fields)
        several = " Each cell is the best of its runs." if len(self.rows) > cells else ""
        caption = f"The stronger the colour the better; the best is framed.{several}"
        several += " Runs that differ in their seed alone count by their mean." if any(r.of for r in self.rows) else ""
        named = [label(row, self.order) + " " + row.shown(self.objective) for row in self.best[:24]]
        return sheet.finish("grid", title, caption, told=f"Best first: {', '.join(named)}.")
