"""What `ftrun fit` found, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftrun.report.plan_text import size


def render(found: Mapping[str, Any], rows: int, console: Console) -> None:
    """Print the choices, the best first, and how their speed was judged."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("settings")
    for name in ("needs", "tokens/s"):
        table.add_column(name, justify="right")
    table.add_column("")
    for number, choice in enumerate(found["choices"][:rows]):
        style = "bold" if number == 0 and choice["fits"] else ""
        table.add_row(
            " ".join(choice["overrides"]),
            size(choice["needed_bytes"]),
            f"{choice['tokens_per_s']:,.0f}",
            choice["why"],
            style=style,
        )
    console.print(table)
    more = len(found["choices"]) - rows
    if more > 0:
        console.print(Text(f"and {more} more: rows={len(found['choices'])} shows them all"))
    console.print(Text(_judged(found)))
    device = f"{found['device']['name']}, {size(found['device']['usable_bytes'])} to plan for"
    if found["best"]:
        console.print(Text(f"{device}: ftrun … {' '.join(found['best'])}", "bold green"))
    else:
        console.print(Text(f"{device}: no choice fits", "bold red"))


def _judged(found: Mapping[str, Any]) -> str:
    speed = found["speed"]
    error = "no error known" if speed["error"] is None else f"a step left out was predicted within {speed['error']:.0%}"
    return f"speed: {speed['from']}; {error}"
