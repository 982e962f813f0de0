"""How a study's plots look: one style, and colours that are names, so that the page gives them for light and dark.

matplotlib draws with stand-in colours; in the SVG each becomes a CSS variable. Text stays text.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftrun.runs import cache_dir

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, WIDE = 540, 1120  # CSS pixels: a figure beside another, a figure alone
SMALL = 11.0  # of text in a plot, CSS pixels; 12 elsewhere

INK, MUTED, RULE, PAPER, HEAT = "#010001", "#010002", "#010003", "#010004", "#010005"
SERIES = tuple(f"#01010{n}" for n in range(6))  # kinds
RAMP = tuple(f"#01020{n}" for n in range(8))  # more and more of something
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    PAPER: "paper",
    HEAT: "heat",
    **{colour: f"series-{n}" for n, colour in enumerate(SERIES)},
    **{colour: f"ramp-{n}" for n, colour in enumerate(RAMP)},
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ftrun",
    "text.parse_math": False,  # a user's $ is a dollar
    "font.family": "DejaVu Sans",  # wider than what the page shows: what fits here fits there
    "font.size": 12,
    "text.color": INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.constrained_layout.h_pad": 0.02,
    "figure.constrained_layout.w_pad": 0.02,
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12,
    "axes.labelpad": 6,
    "axes.titlelocation": "left",
    "axes.titlecolor": MUTED,
    "axes.titlesize": 12,
    "axes.titlepad": 10,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 9),
    "grid.color": RULE,
    "grid.linewidth": 1,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Drawing:
    """A finished figure: title and caption are plain text, legend and svg are HTML."""

    name: str  # of the figure in its page: lower case, digits, hyphens
    title: str
    legend: str
    svg: str
    caption: str
    wide: bool = False


@contextlib.contextmanager
def style() -> Iterator[None]:
    """matplotlib as the plots want it, whatever the user's own settings are; as it was before, afterwards."""
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))  # else it makes a folder in the home
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's browser has the letters
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


class Sheet:
    """A figure in the making: its axes, and what the reader sees over a mark that the pointer rests on."""

    def __init__(self, height: float, width: float = WIDTH, columns: int = 1) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        self.canvas = FigureCanvasAgg(self.figure)
        self.panels: list[Axes] = list(self.figure.subplots(1, columns, squeeze=False, sharey=True)[0])
        self.axes = self.panels[0]
        self.wide = width > WIDTH
        self._hints: dict[str, str] = {}

    def hint(self, artist: Any, words: str) -> None:
        """Say `words` over the artist."""
        name = f"hint-{len(self._hints)}"
        artist.set_gid(name)
        self._hints[name] = words

    def settle(self) -> None:
        """Fix where everything stands, so that what comes on top can be placed by measure."""
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")

    def finish(self, name: str, title: str, caption: str, legend: str = "", told: str = "") -> Drawing:
        """The figure as inline SVG. told: what it shows, for those who do not see it; the caption where empty."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        root = _inline(ET.fromstring(buffer.getvalue()), name, self._hints)
        for tag, words in (("desc", told or caption), ("title", title)):
            part = ET.Element(tag, {"id": f"{name}-{tag}"})
            part.text = words
            root.insert(0, part)
        root.attrib.update({"role": "img", "aria-labelledby": f"{name}-title {name}-desc"})
        return Drawing(name, title, legend, ET.tostring(root, encoding="unicode"), caption, self.wide)


def _inline(root: ET.Element, name: str, hints: Mapping[str, str]) -> ET.Element:
    """The SVG as a part of a page: no namespaces, ids of its own and only where one is referred to, our colours."""
    wanted: set[str] = set()
    for part in root.iter():
        for child in [c for c in part if c.tag.rpartition("}")[2] in ("metadata", "style")]:
            part.remove(child)
        wanted |= {target for value in part.attrib.values() for target in _targets(value)}
    for part in list(root.iter()):
        part.tag = part.tag.rpartition("}")[2]
        found = part.attrib.get("id", "")
        part.attrib = {k.rpartition("}")[2]: _value(v, name) for k, v in part.attrib.items()}
        if found not in wanted:
            part.attrib.pop("id", None)
        else:
            part.attrib["id"] = f"{name}-{found}"
        if found in hints:
            words = ET.Element("title")
            words.text = hints[found]
            part.insert(0, words)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    return root


_TARGET = re.compile(r"^#([\w.-]+)$|url\(#([\w.-]+)\)")
_FONT = re.compile(r"font: (?:(?P<weight>bold|\d{3}) )?(?P<size>[\d.]+)px [^;]*|font-family: [^;]*;? ?")


def _targets(value: str) -> list[str]:
    return [one or other for one, other in _TARGET.findall(value)]


def _value(value: str, name: str) -> str:
    """An attribute's value with colours by name, fonts left to the page, references to ids of this figure."""
    value = _TARGET.sub(lambda m: f"#{name}-{m[1]}" if m[1] else f"url(#{name}-{m[2]})", value)
    value = _FONT.sub(_font, value)
    return re.sub(r"#01[0-9a-f]{4}", lambda m: f"var(--{VARIABLES[m[0]]})" if m[0] in VARIABLES else m[0], value)


def _font(match: re.Match[str]) -> str:
    if not match["size"]:
        return ""
    weight = f"; font-weight: {match['weight']}" if match["weight"] else ""
    return f"font-size: {match['size']}px{weight}"
