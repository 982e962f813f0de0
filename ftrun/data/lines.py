"""Lines of text files with their numbers; what is wrong with a line is said, not raised."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ftrun.data.record import Bad
from ftrun.errors import UserError

MAX_LINE = 64 << 20  # bytes: a longer line is no row but a file without line ends

_BOMS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def numbered(path: Path) -> Iterator[tuple[int, str | Bad]]:
    """(number from 1, line with its end) of a UTF-8 file, plain or .gz; a UTF-8 mark at the start is dropped.

    A line that is not UTF-8, holds a NUL byte or is longer than MAX_LINE comes as `Bad`. Raises UserError where
    the file cannot be read, or is in UTF-16 or UTF-32.
    """
    number = 0
    try:
        with open_bytes(path) as stream:
            while raw := stream.readline(MAX_LINE + 1):
                number += 1
                if number == 1:
                    raw = unmarked(raw, path)
                if len(raw) > MAX_LINE and not raw.endswith(b"\n"):
                    _skip_line(stream)
                    yield number, Bad(f"found a line of over {MAX_LINE >> 20} MiB, expected one row a line")
                    continue
                yield number, decode(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked where its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def decode(raw: bytes) -> str | Bad:
    """Bytes as text, or what is wrong with them."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(f"found the byte 0x{raw[error.start]:02x} at position {error.start + 1}, expected text in UTF-8")
    if "\0" in text:
        return Bad(f"found a NUL byte at position {text.index(chr(0)) + 1}, expected text")
    return text


def unmarked(raw: bytes, path: Path) -> bytes:
    """A file's first bytes without UTF-8's mark. Raises UserError on another encoding's."""
    for mark, name in _BOMS.items():
        if raw.startswith(mark):
            raise UserError(
                f"{path}:1: found {name} text, expected UTF-8. Convert it: iconv -f {name} -t UTF-8 {path.name}"
            )
    return raw.removeprefix(b"\xef\xbb\xbf")


def _skip_line(stream: IO[bytes]) -> None:
    while (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
        pass
