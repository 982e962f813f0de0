"""From what the user typed as `data.path` to files, and their content's hash."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from ftrun.errors import UserError, nearest


def expand(path: str, suffixes: tuple[str, ...], key: str = "data.path") -> list[Path]:
    """The files that `path` names: itself, a folder's files with one of `suffixes` (below it too), or a glob's.

    Raises UserError, naming `key` and the nearest existing name, where there is none.
    """
    full = Path(os.path.expanduser(path))
    if full.is_file():
        return [full]
    if full.is_dir():
        return _in_folder(full, suffixes, key)
    if glob.has_magic(str(full)):
        found = sorted(Path(p) for p in glob.glob(str(full), recursive=True) if Path(p).is_file())
        if not found:
            raise UserError(f"{key}={path}: the pattern matches no file")
        return found
    raise missing(path, key)


def missing(path: str, key: str = "data.path") -> UserError:
    """The error for a path that does not exist, with the nearest name that does."""
    full = Path(os.path.expanduser(path))
    folder, name = full.parent, full.name
    while not folder.is_dir() and folder != folder.parent:
        folder, name = folder.parent, folder.name
    try:
        beside = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        beside = []
    close = nearest(name, beside)
    hint = f" Did you mean {str(folder / close)!r}?" if close else ""
    return UserError(f"{key}={path}: there is no such file or folder.{hint}")


def digest(files: Iterable[Path]) -> str:
    """SHA-256 over the files' names and content, streamed."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file}\0".encode("utf-8", "surrogateescape"))
        try:
            with open(file, "rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    return total.hexdigest()


def _in_folder(folder: Path, suffixes: tuple[str, ...], key: str) -> list[Path]:
    inside = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    found = [p for p in inside if p.name.lower().endswith(suffixes)]
    if found:
        return found
    there = sorted({p.suffix for p in inside if p.suffix})
    what = f"files of the kinds {', '.join(there[:8])}" if there else "no files"
    raise UserError(f"{key}={folder}: expected {' or '.join(suffixes)} files in the folder, found {what}")
