"""Which rows a step takes, which device takes which of them, and rows as tensors.

Everything follows from numbers: a step's rows are the same whoever asks, on whatever device, after whatever restart.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ftrun.data.rows import Rows
from ftrun.values import IGNORE, Batch, rounded


def order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """(n_rows,) int64: the rows in the order of an epoch, read-only."""
    return _order(n_rows, seed, epoch)


@functools.lru_cache(maxsize=4)
def _order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    made = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n_rows)
    made.flags.writeable = False
    return made


def steps_in(epochs: float, n_rows: int, batch: int) -> int:
    """Steps of `epochs` passes over the rows: the last batch of a pass may be smaller, and counts."""
    whole = int(epochs)
    return whole * math.ceil(n_rows / batch) + math.ceil(round((epochs - whole) * n_rows, 6) / batch)


def step_rows(n_rows: int, batch: int, step: int, seed: int, *, by_epoch: bool = False) -> list[int]:
    """The rows of a step, counted from 0.

    by_epoch (a job told `epochs`): an epoch's last batch is as small as what is left, and the next epoch starts anew.
    Else (a job told `steps`): each batch is full, and goes on into the next epoch where one ends.
    """
    if by_epoch:
        epoch, place = divmod(step, math.ceil(n_rows / batch))
        return order(n_rows, seed, epoch)[place * batch : (place + 1) * batch].tolist()
    rows: list[int] = []
    place = step * batch
    while len(rows) < batch:
        epoch, start = divmod(place + len(rows), n_rows)
        rows += order(n_rows, seed, epoch)[start : start + batch - len(rows)].tolist()
    return rows


def micro(
    rows_of_step: Sequence[int],
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    lengths: np.ndarray | None = None,
    packed: bool = False,
) -> list[list[int]]:
    """This device's micro-batches of a step: together the devices take each row once.

    A step is cut into micro-batches, as even as can be, which the devices take in turn: where `batch` is a multiple of
    `micro_batch` times devices they are the same ones however many devices there are, and so, but for the order of
    sums, are the gradients. Every device gets the same number of them; where rows run out, the last are empty, for the
    device to pass by.
    lengths: with them rows of like length share a micro-batch (less padding) or, packed, each micro-batch gets a like
    number of tokens (a lower peak); either way the largest come first.
    """
    rows = list(rows_of_step)
    if lengths is not None:
        # a stable sort: equal lengths keep the step's order
        rows.sort(key=lambda row: -int(lengths[row]))
    count = math.ceil(len(rows) / (world * micro_batch)) * world
    parts = _there_and_back(rows, count) if packed else _one_after_another(rows, count)
    if packed and lengths is not None:
        parts.sort(key=lambda part: -int(lengths[part].sum()) if part else 0)
    return parts[rank::world]


def _one_after_another(rows: list[int], count: int) -> list[list[int]]:
    each, more = divmod(len(rows), count)
    starts = [i * each + min(i, more) for i in range(count + 1)]
    return [rows[start:end] for start, end in itertools.pairwise(starts)]


def _there_and_back(rows: list[int], count: int) -> list[list[int]]:
    """Dealt out as rows in the order of a ploughed field: of sorted ones each part gets long and short ones."""
    parts: list[list[int]] = [[] for _ in range(count)]
    for place, row in enumerate(rows):
        turn, at = divmod(place, count)
        parts[count - 1 - at if turn % 2 else at].append(row)
    return parts


def collate(rows: Rows, indices: Sequence[int], packed: bool, pad_id: int) -> Batch:
    """Rows as one micro-batch, shifted: the target at i is the row's token i + 1 where that is learnt, else IGNORE.

    packed: (1, sum(lengths) + filler), the rows one after another, positions restarting with each, and a last row of
    padding up to a rounded size. Else (rows, max(lengths)), padded right with pad_id, position 0 and IGNORE.
    """
    if not len(indices):
        raise ValueError("a micro-batch of no rows")
    ids = [rows.ids(i) for i in indices]
    lengths = tuple(len(one) for one in ids)
    filler = rounded(sum(lengths)) - sum(lengths) if packed else 0
    shape = (1, sum(lengths) + filler) if packed else (len(ids), max(lengths))
    inputs = np.full(shape, pad_id, np.int64)
    positions = np.zeros(shape, np.int64)
    targets = np.full(shape, IGNORE, np.int64)
    start = 0
    for i, (index, one) in enumerate(zip(indices, ids, strict=True)):
        line, first = (0, start) if packed else (i, 0)
        size = len(one)
        inputs[line, first : first + size] = one
        positions[line, first : first + size] = np.arange(size)
        learn = rows.learn(index)[1:].astype(bool)
        targets[line, first : first + size - 1] = np.where(learn, one[1:], IGNORE)
        start += size
    positions[0, start:] = np.arange(filler) if packed else positions[0, start:]
    return Batch(
        input_ids=torch.from_numpy(inputs),
        position_ids=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        lengths=lengths,
        packed=packed,
        tokens=sum(lengths),
        supervised=int((targets != IGNORE).sum()),
        rows=tuple(int(i) for i in indices),
        filler=filler,
    )


def filled(rows: int, length: int, packed: bool) -> Batch:
    """A micro-batch of `rows` rows of `length` tokens, all of them learnt: the largest that a job can meet."""
    filler = rounded(rows * length) - rows * length if packed else 0
    shape = (1, rows * length + filler) if packed else (rows, length)
    return Batch(
        input_ids=torch.zeros(shape, dtype=torch.int64),
        position_ids=torch.cat([torch.arange(length).repeat(rows), torch.arange(filler)]).view(shape),
        targets=torch.zeros(shape, dtype=torch.int64),
        lengths=(length,) * rows,
        packed=packed,
        tokens=rows * length,
        supervised=rows * length,
        rows=tuple(range(rows)),
        filler=filler,
    )


def cut(batch: Batch, length: int) -> Batch:
    """The micro-batch with its rows cut to `length` tokens."""
    lengths = tuple(min(n, length) for n in batch.lengths)
    more = 0
    if batch.packed:
        real = batch.position_ids[0, : sum(batch.lengths)]
        more = rounded(sum(lengths)) - sum(lengths)
        filler = torch.arange(sum(batch.lengths), sum(batch.lengths) + more).clamp_max(batch.input_ids.shape[1] - 1)
        keep = torch.cat([(real < length).nonzero().squeeze(-1), filler])
    else:
        keep = torch.arange(min(length, batch.input_ids.shape[1]))
    tensors = {name: getattr(batch, name)[:, keep] for name in ("input_ids", "position_ids", "targets")}
    learnt = int((tensors["targets"] != IGNORE).sum())
    facts: dict[str, Any] = {"lengths": lengths, "tokens": sum(lengths), "filler": more, "learnt": None}
    return dataclasses.replace(batch, **tensors, **facts, supervised=learnt)
