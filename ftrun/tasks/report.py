"""Compare runs and studies: a table, and one HTML page with plots that opens anywhere; beside it table.csv.

Each DIR is the folder of a run (runs/NAME) or of a study (studies/NAME). Of several folders, what differs between their
job.yaml files is what is compared; runs that differ in their seed alone are shown by their mean and its deviation.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.errors import UserError, nearest
from ftrun.schema import option

_OWN = ("by", "format", "out")


@dataclass(frozen=True)
class Options:
    """What this verb takes besides its folders."""

    by: str | None = option(
        None, "the figure that runs are ranked by: loss, peak_bytes, tokens_per_s, …; null: the study's own, else loss"
    )
    format: str = option("text", "text, or json: one object on standard output", choices=("text", "json"))
    out: str | None = option(None, "the page, FILE.html; null: DIR/report.html, or ./report.html of several")


def run(folders: Sequence[str], by: str | None, format: str, out: str | None) -> int:
    """Write page and table, print the table; returns 0. folders: as typed."""
    from ftrun.report.study_rows import judged
    from ftrun.studies.gathered import gather, linked, objectives

    places = _places(folders)
    page = _page(places, out)
    rows = gather(places)
    studies = [place for place in places if (place / "study.yaml").is_file()]
    rows = linked(rows, page, studies)
    by, *others = [by] if by else objectives(places[0]) if len(places) == len(studies) == 1 else ["loss"]
    judged(by)
    words = _write(page, places, rows, by, others)
    if format == "json":
        print(json.dumps(_found(page, rows, by, words), ensure_ascii=False, allow_nan=False))
        return 0
    from rich.console import Console

    from ftrun.report.study_table import render

    render(rows, Console(width=None if sys.stdout.isatty() else 120, highlight=False), by)
    print("\n".join([*words, f"{page}, {page.with_name('table.csv')}"]))
    return 0


def _places(folders: Sequence[str]) -> list[Path]:
    """The folders, each once. Raises UserError where there is none, and on what is an option's misspelt name."""
    for word in folders:
        key, equals, _ = word.partition("=")
        if equals and not Path(word).exists() and "/" not in key:
            near = nearest(key, _OWN)
            hint = f" Did you mean {near!r}?" if near else ""
            raise UserError(f"{word}: ftrun report has no such option.{hint} Valid: {', '.join(_OWN)}")
    if not folders:
        raise UserError("ftrun report: which folders? As in: ftrun report studies/NAME, or runs/one runs/other")
    found = {os.path.realpath(path): path for path in (Path(word).expanduser() for word in reversed(folders))}
    return [*reversed(found.values())]


def _page(places: Sequence[Path], out: str | None) -> Path:
    """Where the page goes. Raises UserError where that is no file of HTML."""
    if out is None:
        return places[0] / "report.html" if len(places) == 1 else Path("report.html")
    page = Path(out)
    if page.suffix.lower() not in (".html", ".htm") or page.is_dir():
        raise UserError(f"out={out}: expected a file of HTML, as out={page.with_suffix('')}.html")
    return page


def _write(
    page: Path, places: Sequence[Path], rows: Sequence[Mapping[str, Any]], by: str, others: Sequence[str]
) -> list[str]:
    """The page and the table; returns the summary's sentences, and those of the search of one study."""
    from ftrun.report import study_page, study_table
    from ftrun.report.study_summary import summary
    from ftrun.runs import aside
    from ftrun.studies.found import kept

    one = places[0] if len(places) == 1 else None
    name = one.resolve().name if one is not None else ", ".join(place.resolve().name for place in places[:4])
    name += f" and {len(places) - 4} more" if len(places) > 4 else ""
    kind = "Study" if one is not None and (one / "study.yaml").is_file() else "Report"
    sentences = kept(one) if one is not None and kind == "Study" else []
    try:
        study_table.write_csv(page.with_name("table.csv"), rows)
        with aside(page) as beside:
            beside.write_text(study_page.page(name, rows, sentences, by, kind, others), encoding="utf-8")
    except OSError as error:
        raise UserError(f"out={page}: cannot be written: {error.strerror}; name another: out=FILE.html") from error
    return [*summary(rows, by), *sentences]


def _found(page: Path, rows: Sequence[Mapping[str, Any]], by: str, words: Sequence[str]) -> dict[str, Any]:
    """The object of format=json: the rows without their curves, best first."""
    from ftrun.report.study_rows import arranged, read
    from ftrun.runs import finite

    order = {row.number: place for place, row in enumerate(arranged(read(rows), by))}
    shown = sorted(rows, key=lambda row: order[row["number"]])
    return {
        "by": by,
        "summary": list(words),
        "rows": [finite({k: v for k, v in row.items() if k not in ("curve", "evals", "links")}) for row in shown],
        "page": str(page),
        "table": str(page.with_name("table.csv")),
    }
