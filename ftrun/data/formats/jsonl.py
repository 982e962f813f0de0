"""JSON Lines: one JSON object a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.data.files import digest, expand
from ftrun.data.lines import numbered
from ftrun.data.options import FileOptions
from ftrun.data.record import Bad, Records

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz")
_OTHERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text", ".json": "json"}


@dataclass(frozen=True)
class Options(FileOptions):
    """A .jsonl file, a folder of them, or a glob."""


def check(options: Options) -> None:
    """UserError where the files do not exist."""
    expand(options.path, SUFFIXES)


def fingerprint(options: Options) -> str:
    """Changes with the files' content."""
    return digest(expand(options.path, SUFFIXES))


def records(options: Options) -> Records:
    """Each line's object with its "file:line"; blank lines are passed over."""
    for path in expand(options.path, SUFFIXES):
        yield from lines(path)


def lines(path: Path) -> Records:
    """The objects of one file. An empty file is one bad row."""
    seen = False
    for number, line in numbered(path):
        if isinstance(line, str) and not line.strip():
            continue
        seen = True
        yield f"{path}:{number}", line if isinstance(line, Bad) else parse(line, path)
    if not seen:
        yield f"{path}:1", Bad("the file is empty, expected one JSON object a line", hopeless=True)


def parse(line: str, path: Path) -> dict[str, Any] | Bad:
    """One line as a record."""
    try:
        found = json.loads(line.rstrip("\r\n"))  # behind a line end columns are counted anew
    except json.JSONDecodeError as error:
        return Bad(f"broken JSON at column {error.colno} ({error.msg}), expected one JSON object a line{_hint(path)}")
    except ValueError:
        return Bad("found a number of thousands of digits, expected one JSON object a line")
    except RecursionError:
        return Bad("found JSON nested too deeply, expected one JSON object a line")
    if isinstance(found, dict):
        return found
    kind = {list: "a list", str: "text", type(None): "null", bool: "true/false"}.get(type(found), "a number")
    hint = ". A file that is one JSON list is read by data=json" if isinstance(found, list) else _hint(path)
    return Bad(f"found {kind}, expected one JSON object a line{hint}")


def _hint(path: Path) -> str:
    kind = _OTHERS.get(path.suffix.lower())
    return f". A {path.suffix} file is read by data={kind}" if kind else ""
