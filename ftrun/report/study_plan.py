"""What a study would take, on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def render(
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    words: Callable[[float | None], str],
    console: Console | None = None,
) -> None:
    """A line for each point, then what all of them take. words: seconds as one reads them."""
    console = console or Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    keys = list(dict.fromkeys(key for row in rows for key in row["values"]))
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("", *keys):
        table.add_column(name)
    for name in ("needs", "weights that train", "rows at once", "recomputed", "time"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [str(row["values"].get(key, "")) for key in keys]
        table.add_row(str(row["number"]), *cells, *_figures(row, words))
    if rows:
        console.print(table)
    for row in rows:
        if not row["fits"]:
            kind = "" if row.get("needed_bytes") is None else "does not fit: "
            console.print(f"{row['number']:>2}  {kind}{row['why']}", markup=False)
    jobs = f" ({summary['jobs']} different jobs)" if summary["jobs"] < summary["fit"] else ""
    counted = f"{summary['fit']} of {summary['points']} points fit{jobs}" if rows else "the search decides as it goes"
    counted += ", with more as the search asks for them" if rows and summary.get("more") else ""
    console.print(
        f"{counted}; at most {summary['needed_bytes'] / 1e9:.2f} GB for one, {summary['at_once']} at once; about "
        f"{words(summary['seconds'])} in all ({summary['times_from']})"
    )


def _figures(row: Mapping[str, Any], words: Callable[[float | None], str]) -> list[str]:
    if row.get("needed_bytes") is None:
        return [""] * 5
    return [
        f"{row['needed_bytes'] / 1e9:.2f} GB",
        f"{row['trainable_params']:,}",
        str(row["micro_batch"]),
        str(row["recomputed"]),
        words(row["seconds"]) if row["seconds"] else "",
    ]
