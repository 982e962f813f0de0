"""The objective against what it costs: memory, speed, parameters; the runs that no other beats in both are marked."""

from __future__ import annotations

from collections.abc import Sequence

from ftrun.report.plots import marks
from ftrun.report.plots.ink import MUTED, Drawing, Sheet
from ftrun.report.plots.looks import Looks
from ftrun.report.plots.scales import better, measured_axis, unit_of, window
from ftrun.report.study_rows import FIGURES, NOISE, Row, cost, front, ranked, varied

_NAMED = 24  # runs of the front in the description
_NOTES = {"retention": "Rise on base text: how much the loss rose on text that the base itself wrote. "}


def trade(rows: Sequence[Row], key: str, objective: str) -> Drawing | None:
    """The objective against the figure `key`; None where the runs do not differ in it."""
    own = [row for row in ranked(rows, objective) if row.status != "same" and row.figure(key) is not None]
    if len({row.figure(key) for row in own}) < 2:
        return None
    return _Trade(rows, own, key, objective).draw()


class _Trade:
    """rows: all; own: those that have both figures, best first, each job once."""

    def __init__(self, rows: Sequence[Row], own: Sequence[Row], key: str, objective: str) -> None:
        self.rows, self.own, self.key, self.objective = rows, own, key, objective
        self.looks = Looks(rows, objective)
        xs = [row.figure(key) or 0.0 for row in own]
        ys = [row.figure(objective) or 0.0 for row in own]
        self.ahead = front([(cost(key, x), cost(objective, y)) for x, y in zip(xs, ys, strict=True)])
        self.sheet = Sheet(360)
        self.across, (self.up, unit) = measured_axis(self.sheet.axes, key, xs), unit_of(objective, max(map(abs, ys)))
        self.low, self.high = window([y / self.up for y in ys])
        room = 0.1 * (self.high - self.low)
        self.sheet.axes.set_ylim(self.low - room, self.high + room)
        self.sheet.axes.set_title(f"{FIGURES[objective].label}{unit}{better(objective)}")
        self.heights = [y / self.up for y in ys]
        self.places = [
            (x / self.across, min(max(y, self.low), self.high)) for x, y in zip(xs, self.heights, strict=True)
        ]

    def draw(self) -> Drawing:
        self._front()
        for index in sorted(range(len(self.own)), key=lambda i: i in self.ahead):  # those of the front on top
            self._run(index)
        marks.ring(self.sheet.axes, *self.places[0])
        named = [(*self.places[index], self._short(self.own[index])) for index in sorted(self.ahead)]
        free = 1 if FIGURES[self.key].lower is False else -1  # the side of the front on which no run lies
        marks.name_points(self.sheet, named, self.places, free)
        return self._finish()

    def _front(self) -> None:
        steps = [self.places[self.ahead[0]]]
        for index in self.ahead[1:]:
            steps += [(self.places[index][0], steps[-1][1]), self.places[index]]
        self.sheet.axes.plot(*zip(*steps, strict=True), color=MUTED, linewidth=1.2, alpha=0.6, zorder=1)

    def _run(self, index: int) -> None:
        row, place, axes = self.own[index], self.places[index], self.sheet.axes
        words = marks.told(row, self.rows, self.objective, self.key)
        if spread := row.spread.get(self.objective):
            ends = [min(max(self.heights[index] + s * spread / self.up, self.low), self.high) for s in (-1, 1)]
            axes.plot([place[0]] * 2, ends, color=self.looks.of(row).colour, linewidth=1.4, alpha=0.6, zorder=2)
        if place[1] == self.heights[index]:
            marks.point(self.sheet, axes, *place, self.looks.of(row), words, faint=index not in self.ahead)
        else:
            marks.beyond(self.sheet, axes, *place, self.looks.of(row), words)

    def _short(self, row: Row) -> str:
        """A run's name in the plot: its values alone."""
        return " ".join(row.values[key] for key in self._keys if key in row.values) or str(row.number)

    @property
    def _keys(self) -> list[str]:
        return [key for key in varied(self.rows) if key != NOISE]

    def _finish(self) -> Drawing:
        figure, other = FIGURES[self.objective], FIGURES[self.key]
        names = f" Names give {' '.join(self._keys)}." if self._keys else ""
        off = any(place[1] != height for place, height in zip(self.places, self.heights, strict=True))
        seeds = " Points are means over the seeds, the strokes their deviations." if any(r.of for r in self.own) else ""
        hollow = " Hollow: off the scale." if off else ""
        caption = (
            f"{_NOTES.get(self.key, '')}The line joins the runs that no other beats in both; the best is ringed."
            f"{names}{seeds}{hollow}"
        )
        best = [marks.told(self.own[index], self.rows, self.objective, self.key) for index in self.ahead[:_NAMED]]
        told = f"{len(self.own)} runs; not beaten in both: {'; '.join(best)}."
        title = f"{figure.label[0].upper()}{figure.label[1:]} against {other.label}"
        return self.sheet.finish(f"trade-{self.key.replace('_', '-')}", title, caption, self.looks.legend(), told)
