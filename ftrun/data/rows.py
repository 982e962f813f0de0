"""The rows that training and evaluation see: views of the stores, with the virtual tokens in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Source(Protocol):
    """Where rows lie."""

    lengths: np.ndarray
    supervised: np.ndarray

    def ids(self, row: int) -> np.ndarray: ...
    def learn(self, row: int) -> np.ndarray: ...
    def where(self, row: int) -> str: ...


class Rows:
    """Some rows of some sources, in an order of their own.

    prefix_ids: the virtual tokens that stand before each row, never learnt. lengths: (rows,) int32, tokens with them.
    supervised: (rows,) int32, the learnt tokens that have one to be predicted from.
    """

    def __init__(
        self, sources: Sequence[Source], part: np.ndarray, row: np.ndarray, prefix_ids: tuple[int, ...] = ()
    ) -> None:
        self.sources, self.part, self.row, self.prefix_ids = sources, part, row, prefix_ids
        self._prefix = np.asarray(prefix_ids, np.int32)
        self._silent = np.zeros(len(prefix_ids), np.uint8)
        self.lengths = (self._gather("lengths") + len(prefix_ids)).astype(np.int32)
        self.supervised = self._gather("supervised")

    def __len__(self) -> int:
        return len(self.row)

    def ids(self, i: int) -> np.ndarray:
        """(lengths[i],) int32."""
        ids = self.sources[self.part[i]].ids(self.row[i])
        return np.concatenate([self._prefix, ids]) if self.prefix_ids else ids

    def learn(self, i: int) -> np.ndarray:
        """(lengths[i],) uint8: 1 where the token is learnt."""
        learn = self.sources[self.part[i]].learn(self.row[i])
        return np.concatenate([self._silent, learn]) if self.prefix_ids else learn

    def where(self, i: int) -> str:
        """The row's "file:line"."""
        return self.sources[self.part[i]].where(self.row[i])

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """These rows alone, in this order."""
        chosen = np.asarray(indices, np.int64)
        return Rows(self.sources, self.part[chosen], self.row[chosen], self.prefix_ids)

    def _gather(self, name: str) -> np.ndarray:
        made = np.zeros(len(self.row), np.int32)
        for i, source in enumerate(self.sources):
            mine = self.part == i
            made[mine] = getattr(source, name)[self.row[mine]]
        return made


class Memory:
    """Rows held in memory: (ids, learn) pairs, as a source of `Rows`."""

    def __init__(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], prefixed: bool = False) -> None:
        self.rows = [(np.asarray(ids, np.int32), np.asarray(learn, np.uint8)) for ids, learn in rows]
        first = 0 if prefixed else 1
        self.lengths = np.array([len(ids) for ids, _ in self.rows], np.int32)
        self.supervised = np.array([learn[first:].sum() for _, learn in self.rows], np.int32)

    def ids(self, row: int) -> np.ndarray:
        """(tokens,) int32."""
        return self.rows[row][0]

    def learn(self, row: int) -> np.ndarray:
        """(tokens,) uint8."""
        return self.rows[row][1]

    def where(self, row: int) -> str:
        """The row's place in the list."""
        return f"memory:row {row + 1}"


def in_memory(rows: Sequence[tuple[Sequence[int], Sequence[int]]], prefix_ids: tuple[int, ...] = ()) -> Rows:
    """Rows from (ids, learn) pairs, for probes and tests."""
    count = len(rows)
    source = Memory(rows, prefixed=bool(prefix_ids))
    return Rows([source], np.zeros(count, np.int32), np.arange(count, dtype=np.int64), prefix_ids)
