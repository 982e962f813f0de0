"""A study as a table: table.csv with all there is, and the terminal's, with what differs between the runs."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftrun.report.study_rows import (
    FIGURES,
    STATUSES,
    Row,
    arranged,
    choices,
    folded,
    keys,
    numbers,
    plain,
    ranked,
    read,
    varied,
)
from ftrun.runs import aside

_FIXED = ("number", "status", "reason", "note", "same_as", "out")  # the CSV's first columns
_SETTINGS = 0.6  # of the console, at most, for keys
_NAMED = 8  # runs that share a reason, by number


@dataclass(frozen=True)
class Column:
    """A column as people read it: a cell a row, empty where the row has nothing to say."""

    key: str
    head: str
    cells: tuple[str, ...]
    right: bool  # numbers: their ends stand below one another

    @property
    def constant(self) -> bool:
        """Several rows have it, and all of these the same."""
        there = [cell for cell in self.cells if cell]
        return len(there) > 1 and len(set(there)) == 1


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Every row with every value and figure, in the order of the study; figures in bytes, seconds and nats.

    A figure whose name is a swept key's too is called result.NAME. The file is there whole or not at all.
    """
    values = list(dict.fromkeys(key for row in rows for key in row.get("values") or {}))
    there = dict.fromkeys(key for row in rows for key in row.get("figures") or {})
    figures = [key for key in (*FIGURES, *(k for k in there if k not in FIGURES)) if key in there]
    taken = {*_FIXED, *values}
    heads = [*_FIXED, *(f"values.{k}" if k in _FIXED else k for k in values)]
    with aside(path) as beside, beside.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*heads, *(f"result.{k}" if k in taken else k for k in figures)])
        for row in rows:
            had, got = row.get("values") or {}, row.get("figures") or {}
            cells = [*map(row.get, _FIXED), *map(had.get, values), *map(got.get, figures)]
            writer.writerow([str(cell).lower() if isinstance(cell, bool) else cell for cell in cells])


def value_columns(rows: Sequence[Row]) -> list[Column]:
    """The swept keys, in their order."""
    found = []
    for key in keys(rows):
        cells = tuple(row.values.get(key, "") for row in rows)
        found.append(Column(key, key, cells, bool(numbers(choices(rows, key)))))
    return found


def figure_columns(rows: Sequence[Row], objective: str) -> list[Column]:
    """The figures that any row has, the objective first."""
    there = {key for row in rows for key in row.figures}
    first = [objective] if objective in there else ["train_loss"]  # all there is of eval=none
    order = [*first, *(k for k in FIGURES if k not in first), *sorted(there - set(FIGURES))]
    found = [Column(k, _head(k), tuple(row.shown(k) for row in rows), True) for k in order if k in there]
    return [column for column in found if any(column.cells)]


def _head(key: str) -> str:
    return FIGURES[key].label if key in FIGURES else key


def render(rows: Sequence[Mapping[str, Any]], console: Console, objective: str = "loss") -> None:
    """Print the runs, best first: what differs between them, as much as the console is wide, and what went wrong.

    Raises UserError where a study cannot be judged by the objective.
    """
    there = arranged(folded(read(rows)), objective)
    if not there:
        console.print(Text("no runs"))
        return
    settings, differing = _differing(there, objective)
    notes = tuple(row.note for row in there)
    settings, cramped = _room_for(settings, _SETTINGS * console.width)
    settings += [Column("", "note", notes, False)] if any(notes) else []
    number = Column("", "#", tuple(row.name for row in there), True)
    marks = _marks(there, objective)
    status = Column(
        "", "", tuple(mark or ("" if row.done else row.words) for row, mark in zip(there, marks, strict=True)), False
    )
    shown, left = _fitting([number, *settings, status], differing, console.width)
    console.print(_table([*shown, status], marks))
    for line in _reasons(there):
        console.print(Text(line))
    same = [f"{c.key}={c.cells[0]}" for c in value_columns(there) if c not in (*settings, *cramped)]
    if same:
        console.print(Text(f"the same in all: {' '.join(same)}"))
    left = [*cramped, *left]
    if left:
        console.print(Text(f"no room for: {', '.join(column.head for column in left)}; table.csv has all"))


def _differing(rows: Sequence[Row], objective: str) -> tuple[list[Column], list[Column]]:
    """The columns of keys and of figures that differ between the rows; the objective in any case."""
    shown = set(varied(rows))
    figures = [c for c in figure_columns(rows, objective) if c.key == objective or not c.constant]
    return [c for c in value_columns(rows) if c.key in shown], figures


def _room_for(columns: list[Column], room: float) -> tuple[list[Column], list[Column]]:
    """As many of the columns as there is room for, one at least; and those left out."""
    taken = 0
    for count, column in enumerate(columns):
        taken += _width(column)
        if taken > room and count:
            return columns[:count], columns[count:]
    return columns, []


def _fitting(first: list[Column], more: list[Column], room: int) -> tuple[list[Column], list[Column]]:
    """`first` but for its last, with as many of `more` as there is room for before that one; and those left out."""
    taken = sum(map(_width, first))
    for count, column in enumerate(more):
        taken += _width(column)
        if taken > room and count:
            return [*first[:-1], *more[:count]], more[count:]
    return [*first[:-1], *more], []


def _width(column: Column) -> int:
    return max(map(cell_len, (column.head, *column.cells))) + 3  # with the space around it


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Why runs came to nothing, each reason once: runs 3, 12 failed: no memory left."""
    why: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.reason:
            why.setdefault((row.status, row.reason), []).append(row)
    found = []
    for (status, reason), there in why.items():
        numbers = ", ".join(row.name for row in there[:_NAMED])
        more = f" and {len(there) - _NAMED} more" if len(there) > _NAMED else ""
        words = STATUSES.get(status, (plain(status),) * 2)[len(there) > 1]
        found.append(f"run{'s' if len(there) > 1 else ''} {numbers}{more} {words}: {reason}")
    return found


def _marks(rows: Sequence[Row], objective: str) -> list[str]:
    best = ranked(rows, objective)
    return ["best" if best and row is best[0] else "" for row in rows]


def _table(columns: Sequence[Column], marks: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(Text(column.head), justify="right" if column.right else "left", overflow="fold")
    for index, mark in enumerate(marks):
        table.add_row(*(Text(column.cells[index]) for column in columns), style="bold green" if mark else "")
    return table
