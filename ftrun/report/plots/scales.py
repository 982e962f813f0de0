"""Axes: their scale, their stretch, their labels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ftrun.report.study_rows import FIGURES

_MANY = 10  # values of a swept key: beyond, the axis has round numbers instead of the values
_WIDE = 20  # largest over smallest: beyond, a logarithmic axis
_REACH = 3  # quartile ranges beyond the quartiles: what lies further is off the scale
_LONGEST = 24  # characters of a value on an axis


def cut(text: str, longest: int = _LONGEST) -> str:
    """The text, its end left out where it is long."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def window(values: Sequence[float]) -> tuple[float, float]:
    """(low, high): the stretch that shows the values with a little room; of six and more without far outliers."""
    low, high = min(values), max(values)
    if len(values) >= 6:
        first, _, third = statistics.quantiles(values, n=4)
        reach = _REACH * (third - first)
        inside = [value for value in values if first - reach <= value <= third + reach]
        low, high = (min(inside), max(inside)) if inside else (low, high)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def scale_of(values: Sequence[float]) -> str:
    """log2 where all are powers of two, log where they span much, else linear."""
    if min(values) <= 0:
        return "linear"
    distinct = set(values)
    if len(distinct) > 2 and all(math.frexp(value)[0] == 0.5 for value in distinct):
        return "log2"
    return "log" if max(values) / min(values) >= _WIDE else "linear"


def swept_axis(axes: Any, places: Mapping[str, float], name: str) -> None:
    """The x axis of a swept key. places: value as typed -> number."""
    from matplotlib.ticker import FixedLocator, NullLocator

    values = sorted(set(places.values()))
    kind = scale_of(values)
    _stretch(axes, values, kind, 0.06)
    axes.set_xlabel(cut(name, 60))
    if len(values) > _MANY and kind != "log2":
        round_numbers(axes.xaxis, values, kind)
        return
    words = {number: cut(typed, 12) for typed, number in reversed([*places.items()])}
    shown = _apart(values, [words[value] for value in values], kind)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: words.get(_near(value, values), ""))


def measured_axis(axes: Any, key: str, values: Sequence[float]) -> float:
    """The x axis of a figure, from small to large; returns what its values are to be divided by, for the unit."""
    divisor, unit = unit_of(key, max(map(abs, values)))
    scaled = [value / divisor for value in values]
    spread = min(scaled) > 0 and max(scaled) / min(scaled) >= _WIDE / 2
    kind = "log" if spread else "linear"
    _stretch(axes, scaled, kind, 0.1)
    round_numbers(axes.xaxis, scaled, kind)
    axes.set_xlabel(f"{FIGURES[key].label}{unit}{better(key)}")
    return divisor


def better(key: str) -> str:
    """Which end of the figure's axis is the good one, in words."""
    return {True: " (lower is better)", False: " (higher is better)", None: ""}[FIGURES[key].lower]


def unit_of(key: str, largest: float) -> tuple[float, str]:
    """(divisor, unit in words) for an axis up to `largest`."""
    unit = FIGURES[key].unit
    if unit in ("bytes", "count"):
        names = ("GB", "MB", "kB") if unit == "bytes" else ("billion", "million", "thousand")
        for name, divisor in zip(names, (1e9, 1e6, 1e3), strict=True):
            if largest >= 0.5 * divisor:
                return divisor, f", {name}"
        return 1.0, ", bytes" if unit == "bytes" else ""
    return 1.0, f", {unit}" if unit else ""


def round_numbers(axis: Any, values: Sequence[float], kind: str) -> None:
    """Labels at round numbers: 1, 2, 5 and their tens on a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    axis.set_minor_locator(NullLocator())
    if kind == "linear":
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        return
    low, high = min(values), max(values)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        shown = [s * 10.0**d for d in decades for s in steps if low / 1.3 <= s * 10.0**d <= high * 1.3]
        if len(shown) <= 7:
            break
    axis.set_major_locator(FixedLocator(shown[:: math.ceil(len(shown) / 7)]))
    axis.set_major_formatter(lambda value, _: f"{value:g}".replace("e-0", "e-"))


def _stretch(axes: Any, values: Sequence[float], kind: str, room: float) -> None:
    """The x axis's scale and its ends, with a part of its length free at each."""
    low, high = min(values), max(values)
    if kind == "linear":
        more = room * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_xlim(low - more, high + more)
        return
    axes.set_xscale("log", base=2 if kind == "log2" else 10)
    factor = (high / low) ** room if high > low else 1.5
    axes.set_xlim(low / factor, high * factor)


def _apart(values: Sequence[float], words: Sequence[str], kind: str) -> list[float]:
    """Those values whose labels have room beside one another on an axis of about 450 pixels."""
    at = [value if kind == "linear" else math.log(value) for value in values]
    length = (at[-1] - at[0]) or 1.0
    found, end = [], -math.inf
    for value, place, text in zip(values, at, words, strict=True):
        middle, half = 450 * (place - at[0]) / length, 4 * len(text)
        if middle - half >= end:
            found.append(value)
            end = middle + half + 6
    return found


def _near(value: float, values: Sequence[float]) -> float:
    return min(values, key=lambda known: abs(known - value))
