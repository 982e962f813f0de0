"""CSV and TSV: a header line with the columns' names, then a row a line (or more, in quotes)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftrun.data.files import digest, expand
from ftrun.data.lines import MAX_LINE, numbered
from ftrun.data.options import FileOptions
from ftrun.data.record import Bad, Records, RowError
from ftrun.errors import UserError
from ftrun.schema import option

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


@dataclass(frozen=True)
class Options(FileOptions):
    """A .csv or .tsv file, a folder of them, or a glob."""

    delimiter: str | None = option(
        None, "one character between fields; null = a tab in .tsv, else a comma", pattern="."
    )


def check(options: Options) -> None:
    """UserError where the files do not exist."""
    expand(options.path, SUFFIXES)


def fingerprint(options: Options) -> str:
    """Changes with the files' content."""
    return digest(expand(options.path, SUFFIXES))


def records(options: Options) -> Records:
    """Each row as {column: text} with its "file:line", the line where the row starts."""
    # the default of 131,072 characters refuses long documents
    csv.field_size_limit(MAX_LINE)
    for path in expand(options.path, SUFFIXES):
        tabs = ".tsv" in path.suffixes
        yield from _rows(path, options.delimiter or ("\t" if tabs else ","))


class _Lines:
    """Lines for csv.reader. Not a generator: it goes on after a bad line was raised."""

    def __init__(self, path: Path) -> None:
        self.lines = numbered(path)
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, line = next(self.lines)
        if isinstance(line, Bad):
            raise RowError(line.why)
        return line


def _rows(path: Path, delimiter: str) -> Records:
    lines = _Lines(path)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = _header(reader, path, delimiter)
    if header is None:
        yield f"{path}:1", Bad("the file is empty, expected a header line with the columns' names", hopeless=True)
        return
    while True:
        start = lines.number + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except (csv.Error, RowError) as error:
            yield f"{path}:{start}", Bad(f"found no row: {error}; expected {len(header)} fields, quotes closed")
            continue
        if not fields:
            continue
        if len(fields) != len(header):
            why = f"found {len(fields)} fields, expected {len(header)} ({', '.join(header)})"
            yield f"{path}:{start}", Bad(why)
            continue
        yield f"{path}:{start}", dict(zip(header, fields, strict=True))


def _header(reader: Iterator[list[str]], path: Path, delimiter: str) -> list[str] | None:
    try:
        header = next((fields for fields in reader if fields), None)
    except (csv.Error, RowError) as error:
        raise UserError(f"{path}:1: {error}; expected a header line with the columns' names") from error
    if header is None:
        return None
    names = [name.strip() for name in header]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}:1: the column {twice[0]!r} appears twice, expected names that differ")
    if len(names) == 1 and (other := next((c for c in "\t;|" if c in names[0] and c != delimiter), None)):
        shown = "\\t" if other == "\t" else other
        raise UserError(
            f"{path}:1: found one column {names[0]!r}, expected several. "
            f"Is the delimiter another? data.delimiter='{shown}'"
        )
    return names
