"""A plan for the terminal: tables, a stacked bar of the peak, the memory through a step. Pure text, rich's tables."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

# role -> (its name in words, its sign in a picture without colours, its colour)
ROLES = {
    "weights": ("weights", "█", "blue"),
    "quant_constants": ("quantisation constants", "▓", "cyan"),
    "adapters": ("adapters", "▒", "green"),
    "gradients": ("gradients", "G", "yellow"),
    "optimizer": ("optimiser state", "O", "magenta"),
    "activations": ("activations", "a", "red"),
    "logits": ("logits and their loss", "L", "bright_red"),
    "batch": ("batch", "b", "white"),
    "other": ("other", "·", "bright_black"),
    "rounding": ("rounding to the allocator's blocks", "+", "bright_black"),
}
_BAR, _WIDE, _HIGH = 60, 72, 8  # characters: the stacked bar, the picture of a step, its height in lines


def size(count: float) -> str:
    """Bytes as people read them: 426.5 MB, 45.33 GB (1e9 each)."""
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1), ("GB", 2)):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:,.{digits}f} {unit}"
        count /= 1000
    raise AssertionError


def render(plan: Mapping[str, Any], console: Console) -> None:
    """Print the plan itself, as `ftrun plan format=json` has it."""
    console.print(Group(*[part for part in _parts(plan) if part is not None]), soft_wrap=False)


def render_advice(plan: Mapping[str, Any], console: Console) -> None:
    """Print what common cards and other settings make of the job, and whether it fits."""
    console.print(Group(_cards(plan["cards"]), _savings(plan), _verdict(plan)), soft_wrap=False)


def _parts(plan: Mapping[str, Any]) -> list[Any]:
    return [
        _head(plan),
        Text(),
        _components(plan),
        _bar(plan["at_peak"]),
        Text(),
        _on_top(plan),
        Text(),
        *_step(plan["timeline"]),
        Text(),
        _modules(plan["modules"]),
        Text(),
        _paging(plan),
    ]


def _head(plan: Mapping[str, Any]) -> Text:
    total, trained = plan["total_params"], plan["trainable_params"]
    lengths = plan["lengths"]
    what = "of this job's data, its worst step" if plan["lengths_from"] == "data" else "of seq_len: no data at hand"
    rows = f"{len(lengths)} row{'s' if len(lengths) > 1 else ''} of {_range(lengths)} tokens ({what})"
    lines = [
        " ".join(f"{group}={choice}" for group, choice in plan["job"].items()),
        f"{trained:,} of {total:,} parameters train ({trained / total:.2%}), {size(plan['adapter_bytes'])} on disk",
        f"micro-batch: {rows}; {plan['checkpointing']} of {plan['depth']} layers recomputed",
    ]
    if below := plan.get("without_graph"):
        lines[-1] += f"; the first {below} lie below all that trains and keep nothing for the backward pass"
    if (kept := plan.get("kept_prefix") or {}).get("where", "none") != "none":
        lines.append(
            f"kept from epoch to epoch: what these layers give {kept['rows']:,} rows, {size(kept['bytes'])} "
            + (f"on disk ({kept['why']})" if kept["where"] == "disk" else f"of host memory ({kept['why']})")
        )
        if plan["at_peak"]["other"] >= kept["bytes"] and plan["device"]["type"] == "cpu" and kept["where"] == "memory":
            lines[-1] += ": counted in other"
    return Text("\n".join(lines))


def _range(lengths: Sequence[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low}" if low == high else f"{low} to {high}"


def _components(plan: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("component")
    for name in ("at the peak", "share", "between steps"):
        table.add_column(name, justify="right")
    peak, steady = plan["at_peak"], plan["steady"]
    for role, (words, sign, colour) in ROLES.items():
        if peak.get(role) or steady.get(role):
            share = peak[role] / plan["peak_bytes"]
            table.add_row(Text(sign, colour), words, size(peak[role]), f"{share:.1%}", size(steady[role]))
    table.add_row("", "all", size(plan["peak_bytes"]), "", size(sum(steady.values())), style="bold")
    return table


def _bar(at_peak: Mapping[str, int]) -> Text:
    """The peak as one bar, each component as long as its share."""
    bar, total, drawn, seen = Text("  "), sum(at_peak.values()) or 1, 0, 0
    for role, (_, sign, colour) in ROLES.items():
        seen += at_peak.get(role, 0)
        end = round(_BAR * seen / total)
        bar.append(sign * (end - drawn), colour)
        drawn = end
    return bar


def _on_top(plan: Mapping[str, Any]) -> Text:
    lines = [f"peak: {size(plan['peak_bytes'])}, in the {plan['peak_instant']}"]
    lines += [f"on top: {words} {size(count)}" for words, count in plan["on_top"].items() if count]
    if plan["host_bytes"]:
        lines.append(f"in the host's memory for each device: {size(plan['host_bytes'])} (offload)")
    if plan["paged_bytes"]:
        lines.append(f"of it {size(plan['paged_bytes'])} of optimiser state can leave the device (paged)")
    return Text("\n".join(lines))


def _step(timeline: Sequence[Mapping[str, Any]]) -> list[Text]:
    """The highest memory in each part of a step, as columns; stacked by role where there are colours."""
    columns = _columns(timeline)
    top = max(column["bytes"] for column in columns) or 1
    lines = []
    for line in range(_HIGH, 0, -1):
        text = Text(f"{size(top * line / _HIGH):>9} ", "bright_black")
        for column in columns:
            text.append(*_cell(column, top * (line - 0.5) / _HIGH))
        lines.append(text)
    names = Text(" " * 10)
    for column in columns:
        names.append("│" if column["first"] else " ", "bright_black")
    marks = list(dict.fromkeys(c["at"] for c in columns if c["first"]))  # of several micro-batches one is named
    return [Text("memory through a step:"), *lines, names, Text(" " * 10 + " │ ".join(marks), "bright_black")]


def _cell(column: Mapping[str, Any], level: float) -> tuple[str, str]:
    below = 0
    for role, (_, sign, colour) in ROLES.items():
        below += column["by_role"].get(role, 0)
        if level <= below:
            return sign, colour
    return " ", ""


def _columns(timeline: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """About _WIDE instants: of neighbours the highest. Each part of the step has one; `first` marks its first."""
    found: list[dict[str, Any]] = []
    for part, instants in itertools.groupby(timeline, key=part_of):
        there = list(instants)
        count = max(1, len(there) * _WIDE // max(_WIDE, len(timeline)))
        for number in range(count):
            group = there[number * len(there) // count : (number + 1) * len(there) // count]
            highest = max(group, key=lambda instant: instant["bytes"])
            found.append({**highest, "at": part, "first": number == 0})
    return found


def part_of(instant: Mapping[str, Any]) -> str:
    """The part of a step that an instant belongs to: "backward" of "backward of layer 31, micro-batch 2"."""
    return str(instant["at"]).partition(" of layer")[0].partition(",")[0]


def _modules(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("layers", "module"):
        table.add_column(name)
    for name in ("rank", "modules", "weights that train"):
        table.add_column(name, justify="right")
    table.add_column("tensors")
    for row in rows:
        tensors = ", ".join(f"{n.removesuffix('.weight')} {'×'.join(map(str, s))}" for n, s in row["tensors"].items())
        rank = "" if row["rank"] is None else str(row["rank"])
        table.add_row(row["layers"], row["module"] or "-", rank, str(row["count"]), f"{row['parameters']:,}", tensors)
    return table


def _paging(plan: Mapping[str, Any]) -> Text | None:
    paging = plan["paging"]
    if paging is None:
        return None
    trained, found, large = paging["trained_tensors"], paging["of"], f"{paging['from_elements']:,}"
    words = (
        f"paging: {trained} trained tensors, gathered by layer into {found} for the optimiser: of these "
        f"{paging['tensors']} can page, {size(paging['bytes'])}, those of {large} elements or more"
    )
    return Text(words if plan["device"]["type"] == "cuda" else f"{words}, on CUDA; on a CPU none does")


def _cards(cards: Sequence[Mapping[str, Any]]) -> Text:
    fits = [f"{card['name']}" for card in cards if card["fits"]]
    small = [f"{card['name']}" for card in cards if not card["fits"]]
    lines = [f"fits on: {', '.join(fits) or 'none of the cards below'}"]
    if small:
        lines.append(f"too small: {', '.join(small)}")
    return Text("\n".join(lines))


def _savings(plan: Mapping[str, Any]) -> Table | Text:
    if not plan["savings"]:
        return Text("no change of one setting would save memory")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="what saves most", title_justify="left", title_style="")
    for name in ("change", "saves", "then needs"):
        table.add_column(name, justify="left" if name == "change" else "right")
    table.add_column("what it costs")
    for one in plan["savings"]:
        table.add_row(one["override"], size(one["saved_bytes"]), size(one["needed_bytes"]), one["cost"])
    return table


def _verdict(plan: Mapping[str, Any]) -> Text:
    device = plan["device"]
    words = "fits" if plan["fits"] else "does not fit"
    text = (
        f"{device['name']}: {size(device['free_bytes'])} free, {size(device['usable_bytes'])} to plan for: the job "
        f"{words}, with {size(plan['needed_bytes'])}"
    )
    text += ", paged state left out" if plan["paged_bytes"] else ""
    return Text(text, "bold green" if plan["fits"] else "bold red")
