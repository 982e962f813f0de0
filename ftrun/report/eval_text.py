"""What `ftrun eval` found, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_MODELS = {
    "base": "base",
    "quantised_base": "base, quantised",
    "tuned_on_base": "tuned, on the base",
    "tuned_quantised": "tuned, quantised",
}


def render(found: Mapping[str, Any], console: Console) -> None:
    """Print the figures: before and after, then what quantisation costs, or the trade at each scale."""
    job, base = found["job"], found["base"]
    title = f"{found['run']}: {job['method']} on {base['name']}, {base['quantisation']}"
    console.print(Text(f"{title}; {found['rows']} held-out rows" if "rows" in found else title, "bold"))
    for drift in found["drifts"]:
        console.print(Text(f"drift: {drift}", "yellow"))
    if "lm_eval" in found:
        console.print(_harness(found["lm_eval"]))
        return
    if "scales" in found:
        console.print(_trade(found["scales"]))
        return
    console.print(_sides(found))
    for line in _below(found):
        console.print(Text(line))
    if found["drop"] is not None:
        _drop(found["drop"], console)


def _sides(found: Mapping[str, Any]) -> Table:
    table = _table("", "before", "after", "change")
    held = found["held_out"]
    for key, name in (("loss", "held-out loss"), ("perplexity", "perplexity")):
        _row(table, name, held["before"][key], held["after"][key])
    if found["exact"] is not None:
        sides = found["exact"]
        name = f"exact match ({sides['by']}, {sides['after']['rows']} rows)"
        table.add_row(name, *(f"{sides[k]['share']:.1%}" for k in ("before", "after")), _points(sides))
    for key, name in (("retention", "loss on the base's own text"), ("retention_text", "loss on the held-out text")):
        if found[key] is not None:
            _row(table, name, found[key]["before"], found[key]["after"])
    return table


def _row(table: Table, name: str, before: float, after: float) -> None:
    table.add_row(name, f"{before:,.4f}", f"{after:,.4f}", f"{after - before:+,.4f}")


def _points(sides: Mapping[str, Any]) -> str:
    return f"{(sides['after']['share'] - sides['before']['share']) * 100:+.1f} points"


def _below(found: Mapping[str, Any]) -> list[str]:
    lines = [] if found["scale"] == 1 else [f"scale {found['scale']:g}: so much of the update"]
    if (same := found["agreement"]) is not None:
        lines.append(
            f"against the base, on {same['tokens']:,} tokens: the same next token for {same['agreement']:.1%}; "
            f"KL(base ‖ tuned) {same['kl']:.4f}, KL(tuned ‖ base) {same['kl_reverse']:.4f} nats a token"
        )
    if (rank := found["effective_rank"]) is not None:
        low = min(rank["by_module"], key=rank["by_module"].get)
        high = max(rank["by_module"], key=rank["by_module"].get)
        lines.append(
            f"effective rank of the updates: {rank['mean']:.2f} of {rank['rank']} on average, from "
            f"{rank['lowest']:.2f} ({low}) to {rank['highest']:.2f} ({high})"
        )
    return lines


def _drop(drop: Mapping[str, Any], console: Console) -> None:
    tokens = drop["tokens"]
    heads = [f"{kind} ({count:,})" for kind, count in tokens.items()]
    table = _table("loss, nats a token", "all", *heads, "agreement", "exact")
    for key, name in _MODELS.items():
        row = drop[key]
        losses = [row["loss"], *(row[kind] for kind in tokens)]
        shares = [None if row[k] is None else f"{row[k]:.1%}" for k in ("agreement", "exact")]
        table.add_row(name, *("" if v is None else f"{v:.4f}" for v in losses), *(v or "" for v in shares))
    console.print(table)
    costs = drop["drop"]
    line = f"costs the base {costs['base']:+.4f} and the tuned model {costs['tuned']:+.4f} nats a token"
    console.print(Text(f"{drop['scheme']} {line}"))
    if drop["base_stored_as"]:
        console.print(Text(f"the base itself is {drop['base_stored_as']}: this is the drop of a second quantisation"))


def _trade(rows: list[Mapping[str, Any]]) -> Table:
    table = _table("scale", "held-out loss", "perplexity", "exact match", "loss on the base's own text", "rise")
    for row in rows:
        exact = "" if row["exact"] is None else f"{row['exact']:.1%}"
        kept = ["", ""] if row["rise"] is None else [f"{row['retention']:.4f}", f"{row['rise']:+.4f}"]
        table.add_row(f"{row['scale']:g}", f"{row['loss']:.4f}", f"{row['perplexity']:,.2f}", exact, *kept)
    return table


def _harness(found: Mapping[str, Any]) -> Table:
    models = list(found["models"])
    table = _table("task, metric", *models)
    first = found["models"][models[0]]
    for task, metrics in first.items():
        for metric in metrics:
            values = (found["models"][name].get(task, {}).get(metric) for name in models)
            table.add_row(f"{task} {metric}", *("" if v is None else f"{v:.4f}" for v in values))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
