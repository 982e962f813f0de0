"""A plan as a picture: the peak as a stacked bar, the memory through a step as stacked areas. One SVG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ftrun.report.plan_text import ROLES, part_of, size

_COLOURS = {
    "weights": "#4269d0",
    "quant_constants": "#97bbf5",
    "adapters": "#3ca951",
    "gradients": "#efb118",
    "optimizer": "#a463f2",
    "activations": "#ff725c",
    "logits": "#9c6b4e",
    "batch": "#9498a0",
    "other": "#c9ccd1",
    "rounding": "#e3e5e8",
}
_WIDTH, _HEIGHT = 960, 575
_LEFT, _RIGHT = 84, 24  # room for the axis, for the last label
_TOP, _AREA = 210, 270  # the areas' upper edge and height
_FONT = "font-family='system-ui, sans-serif' font-size='13' fill='#333'"


def plan_figure(plan: Mapping[str, Any]) -> str:
    """One SVG document of `ftrun plan format=json`'s object."""
    roles = [r for r in ROLES if plan["at_peak"].get(r) or any(t["by_role"].get(r) for t in plan["timeline"])]
    title = " ".join(f"{group}={plan['job'][group]}" for group in ("model", "method", "quant", "optim"))
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' width='{_WIDTH}' {_FONT}>",
        f"<title>{escape(title)}</title><rect width='100%' height='100%' fill='white'/>",
        _text(_LEFT, 30, title, "font-size='17' font-weight='600'"),
        _text(_LEFT, 52, f"{size(plan['peak_bytes'])} at the peak, in the {plan['peak_instant']}"),
        *_bar(plan["at_peak"], roles),
        *_legend(plan["at_peak"], roles),
        *_areas(plan["timeline"], roles),
        "</svg>",
    ]
    return "\n".join(parts)


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' {more}>{escape(words)}</text>"


def _bar(at_peak: Mapping[str, int], roles: Sequence[str]) -> list[str]:
    total, width, x = sum(at_peak.values()) or 1, _WIDTH - _LEFT - _RIGHT, float(_LEFT)
    found = []
    for role in roles:
        wide = width * at_peak[role] / total
        hint = f"<title>{escape(ROLES[role][0])}: {size(at_peak[role])}</title>"
        found.append(f"<rect x='{x:.2f}' y='70' width='{wide:.2f}' height='34' fill='{_COLOURS[role]}'>{hint}</rect>")
        x += wide
    return found


def _legend(at_peak: Mapping[str, int], roles: Sequence[str]) -> list[str]:
    found = []
    for number, role in enumerate(roles):
        x, y = _LEFT + (number % 3) * 280, 130 + (number // 3) * 22
        found.append(f"<rect x='{x}' y='{y - 11}' width='12' height='12' fill='{_COLOURS[role]}'/>")
        found.append(_text(x + 18, y, f"{ROLES[role][0]}  {size(at_peak[role])}"))
    return found


def _areas(timeline: Sequence[Mapping[str, Any]], roles: Sequence[str]) -> list[str]:
    """Each role's area on top of those before it, from instant to instant; the parts of the step named below."""
    top = max(t["bytes"] for t in timeline) or 1
    wide = (_WIDTH - _LEFT - _RIGHT) / len(timeline)
    base, floor = [0.0] * len(timeline), _TOP + _AREA
    found = []
    for role in roles:
        upper = [b + t["by_role"].get(role, 0) for b, t in zip(base, timeline, strict=True)]
        edge = [*_steps(upper, wide, top), *reversed(_steps(base, wide, top))]
        found.append(f"<polygon points='{' '.join(edge)}' fill='{_COLOURS[role]}'/>")
        base = upper
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = floor - share * _AREA
        found.append(f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y}' y2='{y}' stroke='#0002'/>")
        found.append(_text(_LEFT - 8, y + 4, size(share * top), "text-anchor='end'"))
    return [*found, *_names(timeline, wide, floor)]


def _steps(levels: Sequence[float], wide: float, top: float) -> list[str]:
    points = []
    for number, level in enumerate(levels):
        y = _TOP + _AREA * (1 - level / top)
        points += [f"{_LEFT + number * wide:.2f},{y:.2f}", f"{_LEFT + (number + 1) * wide:.2f},{y:.2f}"]
    return points


def _names(timeline: Sequence[Mapping[str, Any]], wide: float, floor: float) -> list[str]:
    """The parts of the step below the areas, on two lines where they would meet."""
    found, last, line = [], None, 0
    for number, instant in enumerate(timeline):
        kind = part_of(instant)
        if kind != last:
            x = _LEFT + number * wide
            found.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{floor}' y2='{floor + 8 + 18 * line}' stroke='#0006'/>")
            late = x > _WIDTH - 150  # its name stands before the mark, or it would leave the picture
            place = "text-anchor='end'" if late else ""
            found.append(_text(x - 3 if late else x + 3, floor + 16 + 18 * line, kind, place))
            last, line = kind, (line + 1) % 4
    return found
