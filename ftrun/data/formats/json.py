"""JSON: a file that is one list of objects, an object that holds such a list, or objects one after another."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.data.files import digest, expand
from ftrun.data.lines import open_bytes, unmarked
from ftrun.data.options import FileOptions
from ftrun.data.record import Bad, Records
from ftrun.errors import UserError

SUFFIXES = (".json", ".json.gz")
MAX_ROW = 64 << 20  # characters
_SPACE, _BETWEEN = re.compile(r"\s*"), re.compile(r"[\s,]*")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Options(FileOptions):
    """A .json file, a folder of them, or a glob."""


def check(options: Options) -> None:
    """UserError where the files do not exist."""
    expand(options.path, SUFFIXES)


def fingerprint(options: Options) -> str:
    """Changes with the files' content."""
    return digest(expand(options.path, SUFFIXES))


def records(options: Options) -> Records:
    """Each object with its "file:row N". A broken document stops the job: there is no next row to find in it."""
    for path in expand(options.path, SUFFIXES):
        yield from _document(path)


def _document(path: Path) -> Records:
    row = 0
    for row, found in enumerate(_values(path), start=1):
        nested = _nested(found) if row == 1 else None
        if nested is not None:
            yield from ((f"{path}:row {n}", _object(item)) for n, item in enumerate(nested, start=1))
            continue
        yield f"{path}:row {row}", _object(found)
    if row == 0:
        yield f"{path}:row 1", Bad("the file holds no rows, expected a JSON list of objects", hopeless=True)


def _object(found: Any) -> dict[str, Any] | Bad:
    if isinstance(found, dict):
        return found
    kind = {list: "a list", str: "text", type(None): "null", bool: "true/false"}.get(type(found), "a number")
    return Bad(f"found {kind}, expected an object {{column: value}}")


def _nested(found: Any) -> list[Any] | None:
    """The rows of a file like {"version": 1, "data": [{…}, …]}; None where the object is a row itself."""
    if not isinstance(found, dict):
        return None
    lists = {k: v for k, v in found.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    if len(lists) == 1 and next(iter(lists)) in ("data", "rows", "train", "examples", "instances"):
        return next(iter(lists.values()))
    return None


class _Reader:
    """The file's text, read block by block; what has been used is let go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stream = open_bytes(path)
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.position = "", 0
        self.line, self.column = 1, 0  # where the held text starts
        self.ended = False
        self._first = True

    def more(self, size: int) -> None:
        raw = self.stream.read(size)
        if self._first:
            raw, self._first = unmarked(raw, self.path), False
        self.ended = not raw
        try:
            fresh = self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n", self.position) + error.object[: error.start].count(b"\n")
            byte = error.object[error.start]
            raise UserError(f"{self.path}:{line}: found the byte 0x{byte:02x}, expected text in UTF-8") from error
        self.line, self.column = self.place(self.position)
        self.text, self.position = self.text[self.position :] + fresh, 0

    def skip(self, what: re.Pattern[str] = _SPACE) -> str:
        """Passes over spaces, or spaces and commas; the next character, "" at the end."""
        while True:
            match = what.match(self.text, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.more(_BLOCK)

    def value(self) -> Any:
        """The next JSON value, reading on until it is whole."""
        decoder = json.JSONDecoder()
        while True:
            try:
                found, end = decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                held = len(self.text) - self.position
                if self.ended or held > MAX_ROW:
                    raise self.broken(error.pos, error.msg) from error
            except ValueError as error:
                raise self.broken(self.position, "a number of thousands of digits") from error
            except RecursionError as error:
                raise self.broken(self.position, "nested too deeply") from error
            else:
                # a number at the very end of what was read may go on
                if end < len(self.text) or self.ended:
                    self.position = end
                    return found
            self.more(max(_BLOCK, len(self.text) - self.position))

    def broken(self, position: int, what: str) -> UserError:
        line, column = self.place(position)
        return UserError(f"{self.path}:{line}: broken JSON at column {column + 1} ({what}), expected a list of objects")

    def place(self, position: int) -> tuple[int, int]:
        """(line from 1, characters before on that line) of a position in the held text."""
        break_ = self.text.rfind("\n", 0, position)
        column = self.column + position if break_ < 0 else position - break_ - 1
        return self.line + self.text.count("\n", 0, position), column


def _values(path: Path) -> Iterator[Any]:
    """The elements of the file's list, or its values one after another. Raises UserError where the JSON is broken."""
    try:
        reader = _Reader(path)
        with reader.stream:
            if reader.skip() == "[":
                yield from _elements(reader)
            while reader.skip(_BETWEEN):
                yield reader.value()
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _elements(reader: _Reader) -> Iterator[Any]:
    """The elements of the list that starts here, which is to be all of the file."""
    reader.position += 1
    character = reader.skip()
    while character and character != "]":
        yield reader.value()
        character = reader.skip()
        if character not in ("", ",", "]"):
            raise reader.broken(reader.position, "a comma is missing between two elements")
        if character == ",":
            reader.position += 1
            character = reader.skip()
    if not character:
        raise reader.broken(reader.position, "the list is not closed")
    reader.position += 1
    if reader.skip():
        raise reader.broken(reader.position, "something follows the list")
