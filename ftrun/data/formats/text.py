"""Plain text: each file is one document, learnt whole and split into windows of seq_len tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ftrun.data.files import digest, expand
from ftrun.data.lines import numbered
from ftrun.data.options import FileOptions
from ftrun.data.record import CONTINUES, Bad, Records

SUFFIXES = (".txt", ".md", ".text", ".txt.gz")
BLOCK = 1 << 18  # characters tokenised at once


@dataclass(frozen=True)
class Options(FileOptions):
    """Plain text (a .txt file, a folder of them, or a glob) is learnt whole, in windows of seq_len tokens."""

    FIXED: ClassVar[tuple[str, ...]] = ("columns", "loss_on", "template", "system", "overlong", "limit")


def check(options: Options) -> None:
    """UserError where the files do not exist."""
    expand(options.path, SUFFIXES)


def fingerprint(options: Options) -> str:
    """Changes with the files' content."""
    return digest(expand(options.path, SUFFIXES))


def records(options: Options) -> Records:
    """Each file in blocks that end where a line ends, the "file:line" where a block starts."""
    for path in expand(options.path, SUFFIXES):
        yield from _blocks(path)


def _blocks(path: Path) -> Records:
    held: list[str] = []
    start, size, written = 1, 0, False
    for number, line in numbered(path):
        if isinstance(line, Bad):
            yield f"{path}:{number}", line
            continue
        if size >= BLOCK:
            yield f"{path}:{start}", {"text": "".join(held), CONTINUES: True}
            held, start, size, written = [], number, 0, True
        held.append(line)
        size += len(line)
    text = "".join(held)
    if not written and not text.strip():
        yield f"{path}:1", Bad("the file is empty, expected text", hopeless=True)
        return
    yield f"{path}:{start}", {"text": text, CONTINUES: False}
