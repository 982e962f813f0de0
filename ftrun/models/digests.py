"""What a base's files hold, by SHA-256: each file's, and each tensor's of its own, in one pass over the bytes.

Kept in the cache by the file's path, size and time of change.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ftrun.beside import replace_text
from ftrun.models.sources.folder import read_header

Say = Callable[[str], None]
_PIECE = 1 << 24  # bytes read at once
_TENSOR = re.compile("[0-9a-f]{32}")
_DIGITS = 32  # of a tensor's digest: enough to tell tensors apart


@dataclass(frozen=True)
class FileDigest:
    """whole: the file's SHA-256 in hex. tensors: name -> the first 32 hex digits of the tensor's, dtype and shape in
    front of its bytes."""

    whole: str
    tensors: dict[str, str]


def digest(path: Path, cache: Path, say: Say, fresh: bool = False) -> FileDigest:
    """The digests of one safetensors file, from the cache where it is known there.

    fresh: the bytes are read in any case: a disk's faults change no file's time.
    """
    stat = path.resolve().stat()
    key = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    note = cache / "hashes" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    known = None if fresh else _known(note)
    if known is not None:
        return known
    found = _computed(path)
    try:
        replace_text(note, json.dumps({"sha256": found.whole, "tensors": found.tensors}))
    except OSError as error:
        say(f"warning: the hash of {path.name} is not kept in {note.parent}: {error.strerror or error}")
    return found


def _known(note: Path) -> FileDigest | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        found = json.loads(note.read_text(encoding="utf-8"))
        made = FileDigest(found["sha256"], dict(found["tensors"]))
        if re.fullmatch("[0-9a-f]{64}", made.whole) and all(map(_TENSOR.fullmatch, made.tensors.values())):
            return made
    return None


def _computed(path: Path) -> FileDigest:
    whole, tensors = hashlib.sha256(), {}
    header = sorted(read_header(path).items(), key=lambda item: item[1]["data_offsets"])
    with path.open("rb", buffering=0) as file:
        size = file.read(8)
        text = file.read(struct.unpack("<Q", size)[0])
        whole.update(size + text)
        at, start = 0, 8 + len(text)
        for name, facts in header:
            begin, end = facts["data_offsets"]
            _pass(file, start + at, begin - at, whole)
            tensors[name] = _tensor(file, start + max(at, begin), end - max(at, begin), facts, whole)
            at = max(at, end)
        _pass(file, start + at, path.stat().st_size - start - at, whole)
    return FileDigest(whole.hexdigest(), tensors)


def _tensor(file: IO[bytes], begin: int, size: int, facts: dict[str, Any], whole: Any) -> str:
    own = hashlib.sha256(f"{facts['dtype']}{list(facts['shape'])}".encode())
    for piece in _pieces(file, begin, size):
        own.update(piece)
        whole.update(piece)
    return own.hexdigest()[:_DIGITS]


def _pass(file: IO[bytes], begin: int, size: int, whole: Any) -> None:
    """Bytes between tensors count in the file's digest alone."""
    for piece in _pieces(file, begin, size):
        whole.update(piece)


def _pieces(file: IO[bytes], begin: int, size: int) -> Iterator[bytes]:
    file.seek(begin)
    while size > 0:
        piece = file.read(min(size, _PIECE))
        if not piece:
            return
        size -= len(piece)
        yield piece
