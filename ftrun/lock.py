"""One process at a time in a folder: a lock that dies with its holder, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from ftrun.errors import UserError

NAME = ".lock"


class Lock:
    """A folder that is ours until `release`, or until this process ends."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError, naming the process, where another one holds the folder; OSError where it is read-only."""
        self._handle: int | None = None
        path = folder / NAME
        while self._handle is None:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            if not _locked(handle):
                raise _busy(folder, handle)
            # the last holder may have removed the file while we waited for it
            if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
                self._handle = handle
            else:
                os.close(handle)
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let go. A second call does nothing more."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def check_free(folder: Path) -> None:
    """UserError, naming the process, where one is at work in the folder. Touches nothing."""
    try:
        handle = os.open(folder / NAME, os.O_RDWR)
    except OSError:
        return
    if not _locked(handle):
        raise _busy(folder, handle)
    os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: nobody can hold one
    return True


def _busy(folder: Path, handle: int) -> UserError:
    holder = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
    os.close(handle)
    who = f"process {holder}" if holder else "another process"
    return UserError(f"out={folder}: {who} is at work there; wait for its end, or name another out")
