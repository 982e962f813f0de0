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
    table.add_column("")
    for row in rows:
        known = row.get("needed_bytes") is not None
        figures = (
            [
                f"{row['needed_bytes'] / 1e9:.2f} GB",
                f"{row['trainable_params']:,}",
                str(row["micro_batch"]),
                str(row["recomputed"]),
                words(row["seconds"]) if row["seconds"] else "",
            ]
            if known
            else [""] * 5
        )
        cells = [str(row["values"].get(key, "")) for key in keys]
        trouble = "" if row["fits"] else f"does not fit: {row['why']}" if known else str(row["why"])
        table.add_row(str(row["number"]), *cells, *figures, trouble.splitlines()[0][:120] if trouble else "")
    if rows:
        console.print(table)
    jobs = f"{summary['jobs']} jobs" if summary["jobs"] != summary["points"] else ""
    counted = f"{summary['fit']} of {summary['points']} points fit" + (f" ({jobs})" if jobs else "")
    console.print(
        f"{counted if rows else 'the search decides as it goes'}; at most {summary['needed_bytes'] / 1e9:.2f} GB for "
        f"one, {summary['at_once']} at once; about {words(summary['seconds'])} in all ({summary['times_from']})"
    )
