"""A study's page: its numbers are the rows', its plots those that have data, and a browser draws it without a flaw."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ftrun.report.study_page import page
from tests.report.studies import BASE, ended, grid_study, many, rank_study, row, study

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
_VOID = {"meta", "br", "hr", "img", "input", "link"}


class Read(HTMLParser):
    """The page's elements: every tag is closed in its turn, and text is filed under where it stands."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("th", "td"):
            self.cells[-1].append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += data

    @property
    def figures(self) -> list[str]:
        return self.text.get("h3", [])


def made(rows: list[dict[str, Any]], **more: Any) -> Read:
    return Read(page("a study", rows, [], **more))


def test_the_table_has_the_numbers_of_the_rows() -> None:
    rows, found = grid_study(), made(grid_study())
    head, *lines = found.cells
    assert head[:6] == ["#", "method", "layers", "rank", "status", "held-out loss"]
    assert len(lines) == 18
    speed, trained = head.index("tokens/s"), head.index("trained parameters")
    for cells in lines[:-1]:
        one = rows[int(cells[0]) - 1]
        assert cells[1:4] == [*one["values"].values()]
        assert cells[5] == f"{one['figures']['loss']:.4f}"
        assert cells[speed] == f"{one['figures']['tokens_per_s']:,.0f}"
        assert cells[trained] == f"{one['figures']['trainable_params']:,}"
    losses = [float(cells[5]) for cells in lines[:-1]]
    assert losses == sorted(losses)
    assert [cells[4] for cells in lines] == ["best", *["done"] * 16, "does not fit"]
    assert lines[-1][-1] == rows[11]["reason"]
    (same,) = [text for text in found.text["p"] if text.startswith("The same in all")]
    assert f"all parameters {rows[0]['figures']['total_params']:,}" in same


def test_every_point_says_its_run_and_number() -> None:
    rows, found = grid_study(), made(grid_study())
    hints = found.text["title"]
    for one in rows:
        setting = " ".join(f"{key}={value}" for key, value in one["values"].items())
        there = [hint for hint in hints if setting in hint]
        if one["figures"]:  # on three keys, in the field of cells, in three trades, on two curves
            assert sum(f"held-out loss {one['figures']['loss']:.4f}" in hint for hint in there) == 9
        else:
            assert sum(one["reason"] in hint for hint in there) == 4


def test_the_headline_and_the_summary() -> None:
    text = page("ranks & layers", rank_study(), ["The search <stopped> early."])
    found = Read(text)
    assert found.text["h1"] == ["ranks & layers"]
    assert "1, 2, 4, 8, 16, 32, 64" in "".join(found.text["p"])
    assert f"Best: rank=64, held-out loss 2.2984 (base {BASE})" in "".join(found.text["p"])
    assert "The search <stopped> early." in found.text["p"]


def test_the_plots_are_those_that_have_data() -> None:
    trades = [f"Held-out loss against {x}" for x in ("peak memory", "tokens/s", "trained parameters")]
    curves = ["Training loss", "Held-out loss while training"]
    assert made(rank_study()).figures == [
        "Held-out loss against rank",
        *trades,
        "Held-out loss against rise on base text",
        "Planned and measured peak memory",
        *curves,
        "Effective rank against rank",
        "Time of a generated token",
    ]
    keys = [f"Held-out loss against {x}" for x in ("layers", "rank", "method")]  # what does most first
    peaks = "Planned and measured peak memory"
    assert made(grid_study()).figures == [*keys, "Held-out loss over layers and rank", *trades, peaks, *curves]


def test_a_field_of_cells_needs_a_full_grid() -> None:
    rows = study(layers=["all", "last:8"], rank=["4", "8"])
    assert "Held-out loss over layers and rank" in made(rows).figures
    assert "Held-out loss over layers and rank" not in made(rows[:3]).figures
    rows[3] = ended(4, rows[3]["values"], "failed", None)  # it was tried: the grid is full, its cell says so
    found = made(rows)
    assert "Held-out loss over layers and rank" in found.figures
    assert "failed" in found.text["text"]


def test_the_front_is_named_and_nothing_else() -> None:
    rows = study(layers=["all", "last:8"], rank=["4", "8"])
    for one, loss, peak in zip(rows, (2.5, 2.4, 2.45, 2.6), (100, 200, 300, 90), strict=True):
        one["figures"] |= {"loss": loss, "peak_bytes": peak * 10**7}
        for key in ("tokens_per_s", "trainable_params", "seconds", "planned_peak_bytes"):
            del one["figures"][key]
    found = made(rows)
    names = {text for text in found.text["text"] if text in ("all 4", "all 8", "last:8 4", "last:8 8")}
    assert names == {"all 4", "all 8", "last:8 8"}
    (told,) = [d for d in found.text["desc"] if d.startswith("4 runs; not beaten in both")]
    assert "layers=last:8 rank=8, held-out loss 2.6000, peak memory 900.0 MB" in told


def test_a_key_of_numbers_has_an_axis_and_one_of_texts_has_groups() -> None:
    rows = study(rank=["4", "8", "16", "auto"])
    for one, loss in zip(rows, (2.5, 2.4, 2.3, 2.35), strict=True):
        one["figures"]["loss"] = loss
    mixed = made(rows)
    assert {"4", "8", "16", "auto"} <= set(mixed.text["text"])
    (told,) = [d for d in mixed.text["desc"] if d.startswith("Best at each rank")]
    assert told == "Best at each rank: 4 2.5000, 8 2.4000, 16 2.3000, auto 2.3500."
    axis = "".join(re.findall(r"<svg.*?</svg>", page("s", rank_study(), []), re.S)[0])
    at = {t: float(x) for x, t in re.findall(r'<text [^>]*?x="([\d.]+)"[^>]*>(\d+)</text>', axis)}
    steps = {round(at[str(2 * r)] - at[str(r)], 1) for r in (1, 2, 4, 8, 16, 32)}
    assert max(steps) - min(steps) < 0.2  # a doubling is as wide everywhere


HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(1)> $x_1$ "quoted" id="p" \x00\x1b \ud800 \ufffe 文字 & \n'


def test_users_text_is_text_and_nothing_else() -> None:
    rows = study(layers=[HOSTILE, "all"], rank=["4", "8"])
    rows[3] = ended(4, rows[3]["values"], "failed", HOSTILE)
    for one in rows:
        one["figures"] = one["figures"] and {**one["figures"], "<b>odd</b>": 1.0}
    text = page(HOSTILE, rows, [HOSTILE])
    text.encode("utf-8")
    found = Read(text)
    assert not {"script", "img"} & {tag for tag, _ in found.tags}
    assert not [a for _, attrs in found.tags for a in attrs if a.startswith("on")]
    shown = '<script>alert(1)</script><img src=x onerror=alert(1)> $x_1$ "quoted" id="p" 文字 &'
    assert found.text["h1"] == [shown]
    assert next(cells for cells in found.cells if cells[0] == "4")[-1] == shown
    assert sum(shown in hint for hint in found.text["title"]) > 4
    signs = ["$x_1$", "$y^", "<b>&"]
    assert set(signs) <= set(made(study(targets=signs)).text["text"])


@pytest.mark.parametrize("rows", [rank_study(), grid_study(), many()], ids=["ranks", "grid", "many"])
def test_the_page_stands_alone(rows: list[dict[str, Any]]) -> None:
    text = page("a study", rows, [])
    found = Read(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in found.tags}
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = {
        m for _, attrs in found.tags for v in attrs.values() for m in re.findall(r"(?:^|url\()#([\w.-]+)", v or "")
    }
    assert wanted <= set(ids)
    assert len(text) < 4_000_000


def test_colours_are_names_and_each_has_a_value_for_light_and_for_dark() -> None:
    text = page("a study", grid_study(), [])
    css, _, body = text.partition("</style>")
    light, dark = (set(re.findall(r"(--[\w-]+):", part)) for part in css.split("prefers-color-scheme: dark")[:2])
    used = set(re.findall(r"var\((--[\w-]+)\)", body))
    assert {"--ink", "--series-0", "--heat"} <= used <= light == dark | (light & {"--paper"})
    drawn = re.findall(r"(?:fill|stroke): ?(#[0-9a-f]+|black|white)", body)
    assert not drawn  # none that would be lost on one of the two papers


def test_each_figure_has_a_title_and_a_description() -> None:
    text = page("a study", grid_study(), [])
    drawings = re.findall(r"<figure.*?</figure>", text, re.S)
    assert len(drawings) >= 9
    for drawing in drawings:
        (labels,) = re.findall(r'aria-labelledby="([^"]+)"', drawing)
        title, desc = (re.search(rf'id="{name}">([^<]+)<', drawing) for name in labels.split())
        assert title is not None
        assert f"<h3>{title[1]}</h3>" in drawing
        assert desc is not None
        assert re.search(r"\d", desc[1])


ODD = {
    "none": [],
    "one": [row(1, {"rank": "8"})],
    "one without values": [row(1, {})],
    "one failed": [ended(1, {"rank": "8"}, "failed", "no memory")],
    "all failed": [ended(n, {"rank": str(n)}, "failed", None) for n in (1, 2, 3)],
    "nulls": [{"number": 1, "values": None, "status": "odd", "figures": None, "curve": None}, {}],
    "no figures": [row(n, {"rank": str(n)}, figures={"loss": 2.0 + n}, curve=[], evals=[]) for n in (1, 2)],
    "waiting": [
        row(1, {"rank": "1"}),
        ended(2, {"rank": "2"}, "running", None),
        ended(3, {"rank": "4"}, "waiting", None),
    ],
    "all alike": [row(n, {"rank": str(n)}, figures={"loss": 2.0, "peak_bytes": 5}) for n in (1, 2)],
    "keys that differ": [row(1, {"rank": "4"}), row(2, {"lr": "1e-3"}), row(3, {"lr": "1e-4", "rank": "8"})],
    "zeros": [row(n, {"dropout": d}) for n, d in enumerate(("0", "0.1", "-1"), start=1)],
    "huge": [
        row(n, {"lr": f"1e{n}"}, figures={"loss": 10.0 ** (40 * n - 30), "perplexity": 1.7e308}) for n in (1, 2, 3)
    ],
}


@pytest.mark.parametrize("rows", ODD.values(), ids=ODD)
def test_odd_studies_have_a_page(rows: list[dict[str, Any]]) -> None:
    found = made(rows)
    assert len(found.cells) == (len(rows) + 1 if rows else 0)


def test_numbers_that_are_none_are_drawn_nowhere() -> None:
    rows = study(rank=["4", "8", "16", "32"])
    assert "a cross is a run without a result" not in page("a study", rows, [])
    rows[0]["figures"] |= {"loss": math.nan, "peak_bytes": math.inf}
    rows[1]["figures"] |= {"peak_bytes": math.nan}
    rows[2]["curve"][5:8] = [[6, math.nan], [7, math.inf], [8, None]]
    text = page("a study", rows, [])
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert not re.search(r'[" ](nan|inf|-inf)[" ]', re.sub(r"<(title|desc).*?</\1>", "", drawings, flags=re.S))
    assert '<td class="right">nan</td>' in text
    assert "a cross is a run without a result" in text


def test_one_value_far_off_does_not_flatten_the_rest() -> None:
    rows = study(rank=[str(n) for n in range(1, 9)])
    rows[0]["figures"]["loss"] = 80.0
    text = page("a study", rows, [])
    assert "off the scale (80.0000)" in text
    labels = re.findall(r"<text [^>]*>([\d.]+)</text>", re.findall(r"<svg.*?</svg>", text, re.S)[0])
    assert max(float(value) for value in labels) < 10


@pytest.mark.parametrize(("objective", "label"), [("tokens_per_s", "Tokens/s"), ("peak_bytes", "Peak memory")])
def test_another_objective_is_what_the_page_is_about(objective: str, label: str) -> None:
    rows, found = grid_study(), made(grid_study(), objective=objective)
    best = (max if objective == "tokens_per_s" else min)(
        (one for one in rows if one["figures"]), key=lambda one: one["figures"][objective]
    )
    assert (found.cells[1][0], found.cells[1][4]) == (str(best["number"]), "best")
    assert found.cells[0][5] == label.lower()
    assert {f"{label} against {key}" for key in ("method", "layers", "rank")} <= set(found.figures)
    assert f"{label} against {label.lower()}" not in found.figures
    (lead,) = [text for text in found.text["p"] if text.startswith("Best: ")]
    assert (lead.count("MB"), lead.count("parameters trained")) == (1, 1)


def test_what_else_was_aimed_at_is_drawn_against_the_objective() -> None:
    titles = {"Peak memory against held-out loss", "Peak memory against time"}
    assert not titles & set(made(grid_study(), objective="peak_bytes").figures)
    assert titles < set(made(grid_study(), objective="peak_bytes", others=["loss", "seconds"]).figures)


def test_seeds_are_repetitions_around_a_mean() -> None:
    rows = study(rank=["4", "8", "16"], seed=["0", "1", "2"])
    for one in rows:
        one["figures"]["loss"] += (0.0, 0.01, 0.05)[int(one["values"]["seed"])]
    text = page("a study", rows, [])
    assert "lines go through the mean of the seeds" in text
    drawing = re.findall(r"<svg viewBox.*?</svg>", text, re.S)[0]
    points = re.findall(r"<title>\d: rank=4 seed=.*?<use [^>]*? y=\"([\d.]+)\"", drawing, re.S)
    (start,) = re.findall(r"<path d=\"M [\d.]+ ([\d.]+)  L[^>]*stroke-width: 1.8", drawing)
    assert len(points) == 3
    assert float(start) == pytest.approx(sum(map(float, points)) / 3)


def test_the_same_rows_give_the_same_bytes() -> None:
    script = (
        "import sys; from ftrun.report.study_page import page; from tests.report.studies import grid_study;"
        "assert 'matplotlib' not in sys.modules; sys.stdout.reconfigure(encoding='utf-8');"
        "print(page('a study', grid_study(), []), end=''); assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=ROOT)
    assert done.stdout.decode("utf-8") == page("a study", grid_study(), [])


def test_matplotlib_makes_no_folder_in_the_home(tmp_path: Path) -> None:
    code = "from ftrun.report.plots.ink import style\nwith style(): pass"
    home = {"HOME": str(tmp_path / "home"), "FTRUN_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    (tmp_path / "home").mkdir()
    subprocess.run([sys.executable, "-c", code], check=True, env=home)
    assert (tmp_path / "cache/matplotlib").is_dir()
    assert not any((tmp_path / "home").iterdir())


def test_matplotlibs_settings_are_left_as_they_were() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.linewidth": 9}):  # a user's own
        own = page("a study", rank_study(), [])
    assert own == page("a study", rank_study(), [])
    assert dict(matplotlib.rcParams) == before


# every text of every plot: is it within the plot, does it cover another, is it of a readable size
_LOOK = """
const found = [];
for (const svg of document.querySelectorAll('figure > svg')) {
  const frame = svg.getBoundingClientRect(), seen = [];
  const name = svg.querySelector('title').textContent;
  for (const text of svg.querySelectorAll('text')) {
    const box = text.getBoundingClientRect(), words = text.textContent;
    const across = box.left < frame.left - 2 || box.right > frame.right + 2;
    if (across || box.top < frame.top - 2 || box.bottom > frame.bottom + 2)
      found.push(`${name}: ${words} leaves the plot`);
    for (const [other, said] of seen)
      if (box.left < other.right - 1 && other.left < box.right - 1)
        if (box.top < other.bottom - 3 && other.top < box.bottom - 3) found.push(`${name}: ${words} covers ${said}`);
    seen.push([box, words]);
  }
  if (frame.width < 200 || seen.length < 3) found.push(`${name}: nothing to see`);
}
if (document.documentElement.scrollWidth > innerWidth) found.push('the page is wider than the window');
const probe = [getComputedStyle(document.body).backgroundColor, document.querySelectorAll('figure > svg').length];
document.body.innerHTML = '<pre id="told"></pre>';
document.getElementById('told').textContent = JSON.stringify([found, ...probe]);
"""


def looked_at(text: str, folder: Path, *flags: str) -> list[Any]:
    """[flaws, background, plots] as a browser sees them; a script of the test's own measures, so the policy goes."""
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', text)
    assert policy is not None
    (folder / "report.html").write_text(
        text.replace(policy[0], "").replace("</body>", f"<script>{_LOOK}</script></body>"), encoding="utf-8"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", *flags]
    done = subprocess.run(
        [*map(str, command), "--dump-dom", (folder / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)
    assert told is not None, done.stderr[-2000:]
    return json.loads(told[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 700], ids=["wide", "narrow"])
@pytest.mark.parametrize("rows", [rank_study(), grid_study(), many()], ids=["ranks", "grid", "many"])
def test_a_browser_draws_every_plot_without_clipped_or_covered_text(
    rows: list[dict[str, Any]], width: int, tmp_path: Path
) -> None:
    text = page("a study", rows, [])
    flaws, background, plots = looked_at(text, tmp_path, f"--window-size={width},1200")
    assert flaws == []
    assert background == "rgb(255, 255, 255)"
    assert plots == len(Read(text).figures)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_in_the_dark_shows_the_dark_page(tmp_path: Path) -> None:
    flags = ("--window-size=1280,1200", "--blink-settings=preferredColorScheme=0")
    flaws, background, _ = looked_at(page("a study", rank_study(), []), tmp_path, *flags)
    assert flaws == []
    assert background == "rgb(20, 24, 28)"
