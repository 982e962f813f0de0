"""Files written beside their place and renamed when they are whole; and what killed processes left of them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

from ftrun.runs import aside

# .NAME.PID, .NAME.PID.tmp, .NAME.PID-RANDOM; before the process was named: .NAME-RANDOM
_LEFT = re.compile(r"\..+?(?:\.(\d+)(?:\.tmp|-\w{8})?|-\w{8})")
# a cache may be shared with other machines, whose processes cannot be asked
QUIET = 600  # seconds without a change


def beside(path: Path) -> Path:
    """This process's temporary neighbour of `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def replace_text(path: Path, text: str, private: bool = False) -> None:
    """`text` as the file `path`, whole or not at all. private: its user alone can read it. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with aside(path) as part:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)


def sweep(cache: Path) -> None:
    """Takes away what processes that are gone left half-written in the cache's folders."""
    with contextlib.suppress(OSError):
        for part in [*cache.glob(".*"), *cache.glob("*/.*")]:
            found = _LEFT.fullmatch(part.name)
            if found and not _alive(found[1]) and time.time() - _changed(part) > QUIET:
                if part.is_dir() and not part.is_symlink():
                    shutil.rmtree(part, ignore_errors=True)
                else:
                    part.unlink()


def _alive(process: str | None) -> bool:
    return process is not None and Path("/proc", process).exists()


def _changed(part: Path) -> float:
    """When anything in it was written last."""
    inside = list(part.rglob("*")) if part.is_dir() and not part.is_symlink() else []
    return max(one.lstat().st_mtime for one in [part, *inside])
