"""A file of lines that a full disk does not end."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Lines:
    """Appends to a file, unbuffered. What a full disk does not take is kept, and comes before the next line.

    Other errors of the system are raised, with the file's name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._left = bytearray()
        self.trouble: OSError | None = None  # why some of it is not written yet

    def add(self, line: str) -> None:
        """A line, without its end."""
        self._left += line.encode("utf-8", "backslashreplace") + b"\n"
        self.write()

    def write(self) -> None:
        """As much of what is left as there is room for."""
        try:
            while self._left:
                del self._left[: self._file.write(self._left)]
        except OSError as error:
            error.filename = str(self.path)
            self.trouble = error
            if error.errno not in _FULL:
                raise
        else:
            self.trouble = None

    def content(self) -> bytes:
        """All lines so far, those that are not written among them."""
        return self.path.read_bytes() + self._left

    def settle(self) -> None:
        """To the disk itself. Raises OSError where there is no room for all of it."""
        self.write()
        if self.trouble is not None:
            raise self.trouble
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """What does not fit then is lost."""
        with contextlib.suppress(OSError):
            self.write()
        with contextlib.suppress(OSError):
            self._file.close()
