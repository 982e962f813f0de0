"""What a format hands over: records, each with where it came from, and the parts that a mix is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ftrun.data.options import DataOptions

# in a record of the shape `text`: the document goes on in the next record
CONTINUES = "ftrun:continues"


@dataclass(frozen=True)
class Bad:
    """A row that could not be read, and why: what was found, what was expected. hopeless: there is no other row."""

    why: str
    hopeless: bool = False


class RowError(ValueError):
    """A record that is no row to train on. Its text says what was found and what was expected."""


class ColumnsError(RowError):
    """The columns are not those of any shape: where it is the first row, the others are alike."""


# ("file:line" or "file:row N", the record)
Records = Iterator[tuple[str, dict[str, Any] | Bad]]


@dataclass(frozen=True)
class Part:
    """One source of rows. weight: its share in a mix, None where each row counts once."""

    name: str
    options: DataOptions
    records: Callable[[], Records]
    fingerprint: Callable[[], str]  # changes with the content
    check: Callable[[], None]  # UserError where the source is not there, without reading a row
    weight: float | None = None
