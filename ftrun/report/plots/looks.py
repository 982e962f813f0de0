"""Which run is which in a plot: a colour for one swept key, a shape for another; and the legend that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ftrun.report.plots.ink import INK, MUTED, RAMP, SERIES, VARIABLES
from ftrun.report.plots.scales import cut
from ftrun.report.study_rows import NOISE, Row, choices, effects, numbers, varied

_SHAPES = 4  # values that lines' dashes tell apart
_LONGEST = 48  # characters of a value in a legend
# marker -> its outline in a box of 12 × 12
_OUTLINES = {
    "o": "M6 1.8a4.2 4.2 0 1 0 .01 0z",
    "s": "M2.3 2.3h7.4v7.4h-7.4z",
    "^": "M6 1.4l4.8 8.8h-9.6z",
    "D": "M6 .8l5.2 5.2-5.2 5.2-5.2-5.2z",
    "v": "M6 10.6l4.8-8.8h-9.6z",
    "P": "M4.2 1.4h3.6v2.8h2.8v3.6h-2.8v2.8h-3.6v-2.8h-2.8v-3.6h2.8z",
}
_MARKERS = tuple(_OUTLINES)
_DASHES = ((), (5, 2.5), (1.2, 1.8), (6, 2, 1.2, 2))  # lengths in line widths


@dataclass(frozen=True)
class Look:
    """How one run's marks are drawn."""

    colour: str = SERIES[0]
    marker: str = "o"
    dashes: tuple[float, ...] = ()

    @property
    def line(self) -> object:
        """The line's style as matplotlib takes it."""
        return (0, self.dashes) if self.dashes else "solid"


class Looks:
    """The key that colours show and the one that shapes show: of those with few values the two that matter most.

    without: a key that the plot shows in another way.
    """

    def __init__(self, rows: Sequence[Row], objective: str, without: Sequence[str] = ()) -> None:
        order = [*effects(rows, objective), *varied(rows)]
        free = [key for key in dict.fromkeys(order) if key not in (*without, NOISE)]
        counts = {key: len(choices(rows, key)) for key in free}
        self.hue = next((k for k in free if 2 <= counts[k] <= _room(choices(rows, k))), None)
        self.shape = next((k for k in free if k != self.hue and 2 <= counts[k] <= _SHAPES), None)
        self._hues = choices(rows, self.hue) if self.hue else []
        self._shapes = choices(rows, self.shape) if self.shape else []

    def of(self, row: Row) -> Look:
        """The row's look; grey where it lacks the key that colours show."""
        shape = self._shapes.index(row.values[self.shape]) if self.shape and self.shape in row.values else 0
        if self.hue and self.hue not in row.values:
            return Look(MUTED, _MARKERS[shape], _DASHES[shape])
        hue = self._hues.index(row.values[self.hue]) if self.hue else 0
        return self._look(hue, shape if self.shape else hue)

    def hues(self) -> str:
        """What the colours mean, as HTML, for a plot of lines that shows nothing else."""
        items = [(value, self._colours[number]) for number, value in enumerate(self._hues)]
        return swatches(items, self.hue or "") if items else ""

    def legend(self, lines: bool = False) -> str:
        """What the colours and shapes mean, as HTML; lines: with the lines that the plot draws."""
        hues = [(v, self._look(n, 0 if self.shape else n)) for n, v in enumerate(self._hues)]
        shapes = [(v, Look(INK, _MARKERS[n], _DASHES[n])) for n, v in enumerate(self._shapes)]
        groups = [_group(key, items, lines) for key, items in ((self.hue, hues), (self.shape, shapes)) if key]
        return f'<div class="legend">{"".join(groups)}</div>' if groups else ""

    def _look(self, hue: int, shape: int) -> Look:
        colour = self._colours[hue] if self._hues else SERIES[0]
        return Look(colour, _MARKERS[shape % len(_MARKERS)], _DASHES[shape] if self.shape else ())

    @property
    def _colours(self) -> Sequence[str]:
        """A ramp for three and more numbers, so that more looks like more; else colours of their own."""
        count = len(self._hues)
        if count < 3 or not numbers(self._hues):
            return SERIES
        return [RAMP[round(n * (len(RAMP) - 1) / (count - 1))] for n in range(count)]


def _room(values: Sequence[str]) -> int:
    """As many values as colours tell apart: of numbers more than of kinds."""
    return len(RAMP if numbers(values) else SERIES)


def _group(key: str, items: Sequence[tuple[str, Look]], lines: bool) -> str:
    shown = "".join(f"<span>{_sample(look, lines)}{escape(cut(value, _LONGEST))}</span>" for value, look in items)
    return f"<div><b>{escape(key)}</b>{shown}</div>"


def _sample(look: Look, line: bool) -> str:
    colour = f"var(--{VARIABLES[look.colour]})"
    wide, at = (28, 8) if line else (12, 0)
    dashes = f' stroke-dasharray="{" ".join(str(d * 1.8) for d in look.dashes)}"' if look.dashes else ""
    stroke = f'<path d="M1 6h26" style="stroke:{colour}" stroke-width="1.8" fill="none"{dashes}/>' if line else ""
    mark = f'<path d="{_OUTLINES[look.marker]}" transform="translate({at})" style="fill:{colour}"/>'
    return _picture(wide, stroke + mark)


def _picture(wide: int, inside: str) -> str:
    return f'<svg class="sample" viewBox="0 0 {wide} 12" width="{wide}" height="12" aria-hidden="true">{inside}</svg>'


def swatches(items: Sequence[tuple[str, str]], key: str = "") -> str:
    """A legend of plain colours, as HTML. items: (what it is, its colour); key: what all of them are."""
    square = '<rect x="1" y="1" width="10" height="10" style="fill:var(--{})"/>'
    spans = [
        f"<span>{_picture(12, square.format(VARIABLES[colour]))}{escape(cut(words, _LONGEST))}</span>"
        for words, colour in items
    ]
    head = f"<b>{escape(key)}</b>" if key else ""
    return f'<div class="legend"><div>{head}{"".join(spans)}</div></div>'
