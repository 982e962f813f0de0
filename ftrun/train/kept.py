"""The outputs of the layers below all that trains, kept from the epoch that first sees a row to all later ones.

What a row is given depends, in its last bits, on the rows beside it. So each row belongs to a group, the micro-batch in
which the first epoch meets it, and its outputs are those of that very group, whoever computes them and when: a run that
goes on ends as one that was never stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ftrun.errors import RunFailed
from ftrun.models.prefix import Prefix
from ftrun.values import Batch


class Store(Protocol):
    """Where rows' outputs lie, by their first token's place."""

    def open(self, tokens: int, width: int, dtype: torch.dtype) -> None: ...
    def write(self, places: Sequence[int], rows: Sequence[torch.Tensor]) -> None: ...
    def read(self, place: int, into: torch.Tensor) -> bool | None: ...
    def ahead(self, place: int, tokens: int) -> None: ...
    def residents(self) -> Sequence[torch.Tensor]: ...
    def close(self) -> None: ...


class InMemory:
    """Rows in one block of host memory, which takes its bytes from the start."""

    block: torch.Tensor

    def open(self, tokens: int, width: int, dtype: torch.dtype) -> None:
        """Room for so many tokens."""
        self.block = torch.empty((tokens, width), dtype=dtype)
        self._written: set[int] = set()

    def write(self, places: Sequence[int], rows: Sequence[torch.Tensor]) -> None:
        """The rows of a group, each (tokens, D)."""
        for place, row in zip(places, rows, strict=True):
            self.block[place : place + len(row)].copy_(row)
            self._written.add(place)

    def read(self, place: int, into: torch.Tensor) -> bool | None:
        """One row into (tokens, D); None where it is not there."""
        if place not in self._written:
            return None
        into.copy_(self.block[place : place + len(into)])
        return True

    def ahead(self, place: int, tokens: int) -> None:
        """Nothing to fetch."""

    def residents(self) -> Sequence[torch.Tensor]:
        """The tensors that are held throughout."""
        return [self.block]

    def close(self) -> None:
        """Nothing to let go."""


class OnDisk:
    """Rows in a file, with a checksum for each, that a later run of the same `facts` goes on with."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self._facts = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def open(self, tokens: int, width: int, dtype: torch.dtype) -> None:
        """The file, with the room of all tokens, and what an earlier run left. Raises OSError without that room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._each = width * dtype.itemsize
        self._sums = self._left(f"{self._facts} {tokens}x{width} {dtype}")
        self._file = os.open(self.folder / "rows.bin", os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(self._file, 0, tokens * self._each)

    def _left(self, head: str) -> dict[int, int]:
        """The checksums of rows that are there; none where the file is another job's."""
        path = self.folder / "rows.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        found: dict[int, int] = {}
        if lines and lines[0] == json.dumps({"of": head}):
            for line in lines[1:]:
                # torn or damaged: computed again
                with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
                    found |= {int(place): int(total) for place, total in json.loads(line).items()}
            self._journal = path.open("a", encoding="utf-8")
            return found
        self._journal = path.open("w", encoding="utf-8")
        self._note({"of": head})
        return found

    def _note(self, content: Mapping[Any, Any]) -> None:
        self._journal.write(json.dumps(content) + "\n")
        self._journal.flush()

    def write(self, places: Sequence[int], rows: Sequence[torch.Tensor]) -> None:
        """The rows of a group, each (tokens, D), and then their checksums."""
        sums = {}
        for place, row in zip(places, rows, strict=True):
            content = _bytes(row.cpu().contiguous())
            _write_all(self._file, content, place * self._each)
            sums[place] = zlib.crc32(content)
        self._sums |= sums
        self._note(sums)

    def read(self, place: int, into: torch.Tensor) -> bool | None:
        """One row into (tokens, D); None where it is not there, False where it is not what was written."""
        expected = self._sums.get(place)
        if expected is None:
            return None
        content = _bytes(into)
        count = os.preadv(self._file, [content], place * self._each)
        if count == len(content) and zlib.crc32(content) == expected:
            return True
        del self._sums[place]
        return False

    def ahead(self, place: int, tokens: int) -> None:
        """Tells the system that the row will be read soon."""
        os.posix_fadvise(self._file, place * self._each, tokens * self._each, os.POSIX_FADV_WILLNEED)

    def residents(self) -> Sequence[torch.Tensor]:
        """None are held."""
        return []

    def close(self) -> None:
        """Lets the files go; they stay."""
        os.close(self._file)
        self._journal.close()


def _bytes(row: torch.Tensor) -> memoryview:
    return row.flatten().view(torch.uint8).numpy().data


def _write_all(file: int, content: memoryview, at: int) -> None:
    while len(content):
        count = os.pwrite(file, content, at)
        content, at = content[count:], at + count


class KeptRows:
    """The rows' outputs, by group. groups: the first epoch's micro-batches; lengths: each row's tokens.

    make: the batch of some rows, on the CPU.
    """

    def __init__(
        self,
        prefix: Prefix,
        store: Store,
        groups: Sequence[Sequence[int]],
        lengths: np.ndarray,
        make: Callable[[Sequence[int]], Batch],
        device: torch.device,
        say: Callable[[str], None],
        autocast: Callable[[], Any] = contextlib.nullcontext,
    ) -> None:
        self.prefix, self.store, self.groups, self.lengths = prefix, store, groups, lengths
        self.make, self.device, self.say = make, device, say
        rows = np.fromiter((row for group in groups for row in group), np.int64)
        self.group = np.zeros(len(lengths), np.int64)
        self.group[rows] = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        self.place = np.zeros(len(lengths), np.int64)
        self.place[rows[1:]] = np.cumsum(lengths[rows])[:-1]
        with torch.no_grad(), autocast():
            self.width, self.dtype = self._probe()
        store.open(int(lengths[rows].sum()), self.width, self.dtype)

    def _probe(self) -> tuple[int, torch.dtype]:
        """The width and dtype of what is kept; ValueError where the model does not go on from it as it would whole."""
        batch = self.make([min(range(len(self.lengths)), key=lambda row: self.lengths[row])]).to(self.device)
        whole = self.prefix.run(batch)
        hidden = self.prefix.outputs(batch)
        with self.prefix.passed([hidden]):
            apart = self.prefix.run(batch)
        if not torch.allclose(whole.float(), apart.float(), rtol=1e-2, atol=1e-2 * float(whole.float().std())):
            raise ValueError("its later layers read more than the layer before them gives")
        return hidden.shape[-1], hidden.dtype

    @contextlib.contextmanager
    def given(self, batch: Batch) -> Iterator[None]:
        """Within the block the model begins above the frozen layers, from what is kept of the batch's rows."""
        with self.prefix.passed([self.take(batch)]):
            yield

    def take(self, batch: Batch) -> torch.Tensor:
        """(rows, width, D): the outputs for a batch, on the device. What is not there is computed, by its group."""
        out = torch.zeros((*batch.input_ids.shape, self.width), dtype=self.dtype)
        for row, into in zip(batch.rows, self._rows_of(out, batch), strict=False):  # a filler is no row
            there = self.store.read(int(self.place[row]), into)
            if there is False:
                self.say(f"warning: the kept outputs of row {row} were damaged; they are computed again")
            if not there:
                self._make(int(self.group[row]), batch)
                if not self.store.read(int(self.place[row]), into):
                    raise RunFailed(f"the kept outputs of row {row} cannot be read back; keep_prefix=none needs none")
        return out.to(self.device, non_blocking=True)

    def ahead(self, batches: Sequence[Batch]) -> None:
        """Says which batches come next."""
        for row in (row for batch in batches for row in batch.rows):
            self.store.ahead(int(self.place[row]), int(self.lengths[row]))

    def _make(self, number: int, batch: Batch) -> None:
        """Computes a group anew: from the batch at hand, where that is the group."""
        group = self.groups[number]
        of = batch if tuple(group) == batch.rows else self.make(group).to(self.device)
        rows = list(self._rows_of(self.prefix.outputs(of), of))
        self.store.write([int(self.place[row]) for row in group], rows[: len(group)])

    @staticmethod
    def _rows_of(hidden: torch.Tensor, batch: Batch) -> Iterator[torch.Tensor]:
        """Each row's (tokens, D) within (rows, width, D), without padding."""
        start = 0
        for line, length in enumerate(batch.lengths):
            yield hidden[0, start : start + length] if batch.packed else hidden[line, :length]
            start += length


class KeptLoss:
    """A loss of whole batches, taken from what is kept of their rows on."""

    def __init__(self, loss: Callable[[Batch], torch.Tensor], kept: KeptRows) -> None:
        self.loss, self.kept = loss, kept

    def __call__(self, batch: Batch) -> torch.Tensor:
        with self.kept.given(batch):
            return self.loss(batch)
