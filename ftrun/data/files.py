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
    # os.path, unlike pathlib, takes any name: too long a one, or a link that leads nowhere
    if os.path.isfile(full):
        return [full]
    if os.path.isdir(full):
        return _in_folder(full, suffixes, key)
    if glob.has_magic(str(full)):
        found = sorted(Path(p) for p in glob.glob(str(full), recursive=True) if os.path.isfile(p))
        if not found:
            raise UserError(f"{key}={path}: the pattern matches no file")
        return found
    raise missing(path, key, suffixes)


def missing(path: str, key: str = "data.path", suffixes: tuple[str, ...] = ()) -> UserError:
    """The error for a path that does not exist, with the nearest name that does: a folder's, or a like file's."""
    full = Path(os.path.expanduser(path))
    if os.path.islink(full):
        return UserError(f"{key}={path}: a link that leads to no file or folder ({os.readlink(full)})")
    if os.path.exists(full):
        return UserError(
            f"{key}={path}: expected a plain file or a folder, found a pipe or a device. Write a file first"
        )
    folder, name = full.parent, full.name
    while not os.path.isdir(folder) and folder != folder.parent:
        folder, name = folder.parent, folder.name
    try:
        beside = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        beside = []
    like = (*suffixes, full.suffix) if full.suffix else suffixes
    if like:
        beside = [name for name in beside if name.lower().endswith(like) or os.path.isdir(folder / name)]
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
