"""Tokenised rows on disk: raw arrays and a JSON, written as they come, mapped into memory when read. Never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ftrun.beside import beside
from ftrun.data.encode import Row, Tally

VERSION = 2  # of the encoding: a change of what is cached must change it
_ARRAYS = {
    "ids": np.int32,
    "learn": np.uint8,
    "lengths": np.int32,
    "supervised": np.int32,
    "source": np.int32,
    "number": np.int64,
    "hash": np.uint64,
}


def key(facts: dict[str, Any]) -> str:
    """The cache's key for what decides the rows."""
    text = json.dumps({"version": VERSION, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Store:
    """Rows of one source. The arrays are mapped, not read: rows are fetched as they are asked for.

    lengths, supervised: (rows,) int32; hash: (rows,) uint64 of a row's ids; facts: counts and what was left out.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.facts = facts
        arrays = {name: _map(folder / f"{name}.bin", kind) for name, kind in _ARRAYS.items()}
        self._ids, self._learn = arrays["ids"], arrays["learn"]
        self.lengths, self.supervised = arrays["lengths"], arrays["supervised"]
        self.hash, self._source, self._number = arrays["hash"], arrays["source"], arrays["number"]
        self._starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, row: int) -> np.ndarray:
        """(tokens,) int32."""
        return self._ids[self._starts[row] : self._starts[row + 1]]

    def learn(self, row: int) -> np.ndarray:
        """(tokens,) uint8."""
        return self._learn[self._starts[row] : self._starts[row + 1]]

    def where(self, row: int) -> str:
        """The row's "file:line"."""
        return f"{self.facts['sources'][self._source[row]]}{self._number[row]}"


def cached(folder: Path, make: Callable[[Tally], Iterable[list[Row]]], first: int, say: Callable[[str], None]) -> Store:
    """The store in `folder`, made by `make` where there is none, or a damaged one.

    first: the first token of a row that can be a target (0 behind virtual tokens, else 1).
    """
    facts = _sound(folder)
    if facts is not None:
        return Store(folder, facts)
    try:
        if folder.exists():
            say(f"data: the cache {folder} is damaged; it is made anew")
            shutil.rmtree(folder)
        return Store(folder, _write(folder, make, first))
    except OSError as error:
        say(f"warning: the tokenised rows are not kept in {folder.parent}: {error.strerror or error}")
    # mapped files live on without a name
    with tempfile.TemporaryDirectory(prefix="ftrun-") as alone:
        return Store(Path(alone) / folder.name, _write(Path(alone) / folder.name, make, first))


def _sound(folder: Path) -> dict[str, Any] | None:
    """The facts of a whole store whose arrays are as they were written, else None."""
    try:
        facts = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        checks = facts["checks"]
        sound = all(_check(folder / f"{name}.bin") == tuple(checks[name]) for name in _ARRAYS)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return facts if sound else None


def _write(folder: Path, make: Callable[[Tally], Iterable[list[Row]]], first: int) -> dict[str, Any]:
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # readable by the user alone, as mkdtemp makes it
    new = Path(tempfile.mkdtemp(prefix=f"{beside(folder).name}-", dir=folder.parent))
    try:
        tally = Tally()
        sources = _stream(new, make(tally), first)
        checks = {name: _check(new / f"{name}.bin") for name in _ARRAYS}
        facts = {"counts": dict(tally.counts), "left_out": tally.left_out, "sources": sources, "checks": checks}
        (new / "rows.json").write_text(json.dumps(facts), encoding="utf-8")
        try:
            os.rename(new, folder)
        except OSError:
            # another process was first: the key says that its rows are the same
            if _sound(folder) is None:
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return facts


def _stream(folder: Path, batches: Iterable[list[Row]], first: int) -> list[str]:
    """Appends the rows to the arrays' files; the names of their sources."""
    sources: dict[str, int] = {}
    files = {name: open(folder / f"{name}.bin", "wb") for name in _ARRAYS}  # noqa: SIM115
    try:
        for rows in batches:
            columns: dict[str, Any] = {name: [] for name in _ARRAYS}
            for row in rows:
                name, number = _split(row.where)
                columns["ids"].append(row.ids)
                columns["learn"].append(row.learn)
                columns["lengths"].append(len(row.ids))
                columns["supervised"].append(int(row.learn[first:].sum()))
                columns["source"].append(sources.setdefault(name, len(sources)))
                columns["number"].append(number)
                columns["hash"].append(int.from_bytes(hashlib.blake2b(row.ids.tobytes(), digest_size=8).digest()))
            for name, kind in _ARRAYS.items():
                flat = np.concatenate(columns[name]) if name in ("ids", "learn") and rows else columns[name]
                files[name].write(np.asarray(flat, kind).tobytes())
    finally:
        for file in files.values():
            file.close()
    return list(sources)


def _split(where: str) -> tuple[str, int]:
    name = where.rstrip("0123456789")
    return name, int(where[len(name) :] or 0)


def _check(file: Path) -> tuple[int, int]:
    """(bytes, CRC-32) of a file."""
    size = checksum = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return size, checksum


def _map(file: Path, kind: Any) -> np.ndarray:
    # an empty file cannot be mapped
    return np.memmap(file, kind, "r") if file.stat().st_size else np.zeros(0, kind)
