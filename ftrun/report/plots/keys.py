"""The objective against one swept key: numbers on an axis, kinds as groups."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ftrun.report.plots import marks
from ftrun.report.plots.ink import MUTED, RULE, Drawing, Sheet
from ftrun.report.plots.looks import Look, Looks
from ftrun.report.plots.scales import better, cut, swept_axis, unit_of, window
from ftrun.report.study_rows import FIGURES, NOISE, Row, choices, numbers, ranked, varied

_LINES = 24  # lines in one plot: with more the points stand alone
_GROUPS = 24  # kinds in one plot: with more those of the best runs are drawn


def against(rows: Sequence[Row], key: str, objective: str) -> Drawing | None:
    """The objective against the swept key; None where fewer than two of its values have one."""
    there = [row for row in rows if key in row.values]
    good = ranked(there, objective)
    if len({row.values[key] for row in good}) < 2:
        return None
    drawn = _Plot(there, good, key, objective)
    return drawn.on_axis() if numbers(choices(there, key)) else drawn.in_groups()


class _Plot:
    """rows: those that have the key; good: those of them that have the objective, best first."""

    def __init__(self, rows: Sequence[Row], good: Sequence[Row], key: str, objective: str) -> None:
        self.rows, self.good, self.key, self.objective = rows, good, key, objective
        self.looks = Looks(rows, objective, without=[key])
        known = {id(row) for row in good}
        self.bad = [row for row in rows if not row.open and id(row) not in known]
        self.divisor, self.unit = unit_of(objective, max(abs(self.value(row)) for row in good))
        self.low, self.high = (end / self.divisor for end in window([self.value(row) for row in good]))

    def value(self, row: Row) -> float:
        return row.figure(self.objective) or 0.0

    def on_axis(self) -> Drawing:
        """A line for each setting of the other keys; repetitions as points around their mean."""
        sheet, places = Sheet(330), numbers(choices(self.rows, self.key))
        swept_axis(sheet.axes, {typed: places[typed] for typed in choices([*self.good, *self.bad], self.key)}, self.key)
        sheet.axes.set_ylim(self.low, self.high)
        sheet.axes.grid(visible=False, axis="x")
        sheet.axes.set_title(f"{FIGURES[self.objective].label}{self.unit}{better(self.objective)}")
        lined = self._lines(sheet, places)
        best_lined = not lined and self._best_line(sheet, places)
        for row in reversed(self.good):
            self._mark(sheet, row, places[row.values[self.key]], self.value(row) / self.divisor, level=True)
        for row in self.bad:
            marks.cross(sheet, sheet.axes, places[row.values[self.key]], self._worst, self._why(row))
        best = self.good[0]
        marks.ring(sheet.axes, places[best.values[self.key]], self._held(self.value(best) / self.divisor))
        notes = ["the grey line joins the best at each value"] if best_lined else []
        notes += ["lines go through the mean of the seeds"] if lined and NOISE in varied(self.rows) else []
        return self._finish(sheet, notes, lined)

    def in_groups(self) -> Drawing:
        """A band for each kind, from top to bottom; within it a place for each setting of the other keys."""
        kinds = choices(self.rows, self.key)
        if len(kinds) > _GROUPS:
            kinds = choices(self.good, self.key)[:_GROUPS]
        settings = list(dict.fromkeys(self._others(row) for row in self.rows))
        band = min(120.0, max(30.0, 9.0 * len(settings), 220 / len(kinds)))
        sheet = Sheet(min(900.0, 90 + band * len(kinds)))
        self._bands(sheet, kinds)
        for row in [*reversed(self.good), *self.bad]:
            if row.values[self.key] in kinds:
                share = (settings.index(self._others(row)) + 0.5) / len(settings) - 0.5
                self._in_band(sheet, row, kinds.index(row.values[self.key]) + 0.76 * share)
        return self._finish(sheet, [])

    def _bands(self, sheet: Sheet, kinds: Sequence[str]) -> None:
        axes = sheet.axes
        axes.set_xlim(self.low, self.high)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.set_yticks(range(len(kinds)), [cut(kind) for kind in kinds])
        axes.grid(visible=False, axis="y")
        for edge in range(1, len(kinds)):
            axes.axhline(edge - 0.5, color=RULE, linewidth=1, zorder=0)
        axes.set_xlabel(f"{FIGURES[self.objective].label}{self.unit}{better(self.objective)}")
        axes.set_title(cut(self.key, 60))

    def _in_band(self, sheet: Sheet, row: Row, place: float) -> None:
        if row in self.bad:
            marks.cross(sheet, sheet.axes, self._worst, place, self._why(row))
            return
        self._mark(sheet, row, self.value(row) / self.divisor, place, level=False)
        if row is self.good[0]:
            marks.ring(sheet.axes, self._held(self.value(row) / self.divisor), place)

    def _mark(self, sheet: Sheet, row: Row, x: float, y: float, *, level: bool) -> None:
        """A run's point; level: the objective runs along y. A value off the scale stands at its edge."""
        words = marks.told(row, self.rows, self.objective)
        along = y if level else x
        held = self._held(along)
        draw = marks.point if held == along else marks.beyond
        draw(sheet, sheet.axes, x if level else held, held if level else y, self.looks.of(row), words)

    def _lines(self, sheet: Sheet, places: dict[str, float]) -> bool:
        """Join what differs in this key alone; True where there are lines."""
        groups: dict[tuple[str | None, ...], list[Row]] = {}
        for row in self.good:
            groups.setdefault(self._others(row), []).append(row)
        drawn = False
        for group in groups.values() if len(groups) <= _LINES else ():
            at: dict[float, list[float]] = {}
            for row in group:
                at.setdefault(places[row.values[self.key]], []).append(self.value(row) / self.divisor)
            if len(at) > 1:
                self._line(sheet, {x: fmean(at[x]) for x in sorted(at)}, self.looks.of(group[0]), len(groups))
                drawn = True
        return drawn

    def _best_line(self, sheet: Sheet, places: dict[str, float]) -> bool:
        """Join the best at each value; not where nearly every run has a value of its own."""
        best: dict[float, float] = {}
        for row in self.good:
            best.setdefault(places[row.values[self.key]], self.value(row) / self.divisor)
        if not 1 < len(best) <= len(self.good) / 2:
            return False
        self._line(sheet, dict(sorted(best.items())), Look(MUTED), 1)
        return True

    def _line(self, sheet: Sheet, level: dict[float, float], look: Look, count: int) -> None:
        ys = [self._held(y) for y in level.values()]
        width = 1.8 if count <= 8 else 1.1
        sheet.axes.plot([*level], ys, color=look.colour, linestyle=look.line, linewidth=width, alpha=0.85, zorder=2)

    def _held(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    def _others(self, row: Row) -> tuple[str | None, ...]:
        return tuple(row.values.get(key) for key in varied(self.rows) if key not in (self.key, NOISE))

    @property
    def _worst(self) -> float:
        return self.low if FIGURES[self.objective].lower is False else self.high

    def _why(self, row: Row) -> str:
        return f"{marks.told(row, self.rows)}: {row.words}{': ' if row.reason else ''}{row.reason}"

    def _finish(self, sheet: Sheet, more: Sequence[str], lined: bool = False) -> Drawing:
        figure = FIGURES[self.objective]
        notes = ["The best is ringed", *more]
        off = [row for row in self.good if not self.low <= self.value(row) / self.divisor <= self.high]
        notes += [f"hollow: off the scale ({', '.join(row.shown(self.objective) for row in off[:4])})"] if off else []
        notes += ["a cross is a run without a result"] if self.bad else []
        words = "; ".join(notes) + "."
        there = {row.values[self.key] for row in self.good}
        values = ", ".join(self._best_at(kind) for kind in choices(self.rows, self.key) if kind in there)
        name = f"key-{varied(self.rows).index(self.key)}"
        title = f"{figure.label[0].upper()}{figure.label[1:]} against {self.key}"
        return sheet.finish(name, title, words, self.looks.legend(lined), f"Best at each {self.key}: {values}.")

    def _best_at(self, kind: str) -> str:
        best = next(row for row in self.good if row.values[self.key] == kind)
        return f"{kind} {best.shown(self.objective)}"
