"""A step's rows, their share over devices, and rows as tensors."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest
import torch

from ftrun.data.batches import collate, cut, micro, order, step_rows, steps_in
from ftrun.data.prefetch import prefetch
from ftrun.data.rows import in_memory
from ftrun.values import IGNORE, rounded


def some_rows(prefix=()):
    rng = np.random.default_rng(0)
    sizes = [5, 2, 9, 3, 7]
    made = [(rng.integers(1, 50, n).tolist(), [0] * (n // 2) + [1] * (n - n // 2)) for n in sizes]
    made[4] = (made[4][0], [0, 1, 0, 1, 0, 1, 0])
    return in_memory(made, prefix)


def test_an_epoch_takes_each_row_once_in_an_order_of_its_own():
    orders = [order(100, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(one) == list(range(100)) for one in orders)
    assert len({tuple(one) for one in orders}) == 4
    assert order(100, 0, 1).tolist() == orders[1]


def test_steps_go_on_into_the_next_epoch():
    seen = [row for step in range(25) for row in step_rows(10, 4, step, seed=3)]
    assert all(sorted(seen[i : i + 10]) == list(range(10)) for i in range(0, 100, 10))
    assert all(len(step_rows(10, 4, step, seed=3)) == 4 for step in range(25))
    assert len(step_rows(3, 8, 0, seed=0)) == 8


def test_epochs_end_with_what_is_left():
    assert steps_in(2, 10, 4) == 6
    batches = [step_rows(10, 4, step, seed=3, by_epoch=True) for step in range(6)]
    assert [len(b) for b in batches] == [4, 4, 2] * 2
    for half in (batches[:3], batches[3:]):
        assert sorted(row for b in half for row in b) == list(range(10))
    assert [steps_in(e, 10, 4) for e in (0.5, 1, 1.1, 1.5)] == [2, 3, 4, 5]
    assert steps_in(0.3, 10, 3) == 1


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 7, 8])
def test_devices_share_a_steps_rows(world, micro_batch, count):
    lengths = np.random.default_rng(1).integers(1, 100, 50)
    rows = step_rows(50, count, 0, seed=0)
    for given, packed in ((None, False), (lengths, False), (lengths, True)):
        shares = [micro(rows, micro_batch, rank, world, given, packed) for rank in range(world)]
        assert {len(share) for share in shares} == {math.ceil(count / (world * micro_batch))}
        assert sorted(r for share in shares for batch in share for r in batch) == sorted(rows)
        sizes = [len(batch) for share in shares for batch in share]
        assert max(sizes) <= micro_batch
        assert max(sizes) - min(sizes) <= 1
    assert micro(rows, micro_batch, 0, world, lengths) == micro(rows, micro_batch, 0, world, lengths)


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_is_cut_into_the_same_micro_batches_on_any_number_of_devices(packed):
    lengths = np.random.default_rng(2).integers(1, 100, 50)
    rows = step_rows(50, 24, 0, seed=0)
    whole = micro(rows, 2, lengths=lengths, packed=packed)
    for world in (2, 3, 4, 6, 12):
        shares = [micro(rows, 2, rank, world, lengths, packed) for rank in range(world)]
        assert [batch for turn in zip(*shares, strict=True) for batch in turn] == whole


def test_like_lengths_share_a_micro_batch():
    lengths = np.array([1, 100, 2, 99, 3, 98])
    assert micro(range(6), 3, lengths=lengths) == [[1, 3, 5], [4, 2, 0]]


def test_packed_micro_batches_hold_like_numbers_of_tokens_the_fullest_first():
    lengths = np.array([1, 100, 2, 99, 3, 98])
    assert micro(range(6), 2, lengths=lengths, packed=True) == [[1, 0], [3, 2], [5, 4]]
    lengths = np.random.default_rng(3).integers(1, 500, 64)
    sizes = [int(lengths[part].sum()) for part in micro(range(64), 8, lengths=lengths, packed=True)]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) < 1.05 * min(sizes)
    one_after_another = [int(lengths[part].sum()) for part in micro(range(64), 8, lengths=lengths)]
    assert max(sizes) < 0.65 * max(one_after_another)


@pytest.mark.parametrize("prefix", [(), (90, 91, 92)])
def test_packed_and_padded_hold_the_same(prefix):
    rows = some_rows(prefix)
    indices = [2, 0, 4, 1]
    packed, padded = (collate(rows, indices, packed, pad_id=63) for packed in (True, False))
    assert packed.lengths == padded.lengths == tuple(rows.lengths[indices].tolist())
    assert packed.input_ids.shape == (1, packed.tokens + packed.filler)
    assert packed.tokens + packed.filler == rounded(packed.tokens)
    assert (packed.input_ids[0, packed.tokens :] == 63).all()
    assert (packed.targets[0, packed.tokens :] == IGNORE).all()
    assert packed.position_ids[0, packed.tokens :].tolist() == list(range(packed.filler))
    assert padded.input_ids.shape == (4, max(packed.lengths))
    start = 0
    for line, (index, size) in enumerate(zip(indices, packed.lengths, strict=True)):
        ids, learn = rows.ids(index), rows.learn(index)
        targets = [int(ids[i + 1]) if learn[i + 1] else IGNORE for i in range(size - 1)] + [IGNORE]
        for batch, at in ((packed, (0, slice(start, start + size))), (padded, (line, slice(size)))):
            assert batch.input_ids[at].tolist() == ids.tolist()
            assert batch.position_ids[at].tolist() == list(range(size))
            assert batch.targets[at].tolist() == targets
        assert (padded.input_ids[line, size:] == 63).all()
        assert (padded.targets[line, size:] == IGNORE).all()
        assert (padded.position_ids[line, size:] == 0).all()
        start += size
    assert packed.tokens == padded.tokens == int(rows.lengths[indices].sum())
    assert packed.supervised == padded.supervised == int(rows.supervised[indices].sum())
    assert packed.rows == (2, 0, 4, 1)
    assert packed.input_ids.dtype == packed.targets.dtype == packed.position_ids.dtype == torch.int64
    if prefix:
        assert packed.input_ids[0, :3].tolist() == [90, 91, 92]
        assert packed.targets[0, :2].tolist() == [IGNORE] * 2
        with pytest.raises(ValueError, match="no rows"):
            collate(rows, [], True, 0)


def test_pad_that_is_eos_does_not_hide_eos():
    rows = in_memory([([5, 6, 2], [0, 1, 1]), ([5, 6, 7, 8, 2], [0, 0, 0, 1, 1])])
    batch = collate(rows, [0, 1], packed=False, pad_id=2)
    assert batch.targets.tolist() == [[6, 2, IGNORE, IGNORE, IGNORE], [IGNORE, IGNORE, 8, 2, IGNORE]]


def test_gradients_are_the_same_packed_padded_and_split():
    rows = some_rows()
    torch.manual_seed(0)
    table = torch.nn.Embedding(64, 8)
    head = torch.nn.Linear(8, 64)
    indices = [0, 1, 2, 3, 4]
    total = int(rows.supervised.sum())

    def gradient(batches):
        table.zero_grad()
        for batch in batches:
            logits = head(table(batch.input_ids))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
            (loss / total).backward()
        return table.weight.grad.clone()

    whole = gradient([collate(rows, indices, True, 0)])
    for split in ([collate(rows, indices, False, 0)], [collate(rows, [i], True, 0) for i in indices]):
        torch.testing.assert_close(gradient(split), whole)
    shares = [micro(indices, 2, rank, 2, rows.lengths) for rank in range(2)]
    torch.testing.assert_close(gradient(collate(rows, b, False, 0) for share in shares for b in share if b), whole)


def test_views_of_rows():
    rows = some_rows((7,))
    few = rows.take([4, 0])
    assert few.ids(1).tolist() == rows.ids(0).tolist()
    assert few.lengths.tolist() == rows.lengths[[4, 0]].tolist()
    assert (few.where(0), len(few)) == ("memory:row 5", 2)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prefetch_keeps_the_order(ahead):
    assert list(prefetch(iter(range(50)), ahead)) == list(range(50))


def test_prefetch_works_ahead_and_no_further():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    stream = prefetch(items(), 3)
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 5  # one taken, three waiting, one at the door
    stream.close()
    assert not [t for t in threading.enumerate() if t.name == "ftrun-prefetch"]


def test_prefetch_carries_exceptions():
    def items():
        yield 1
        raise KeyError("broken")

    stream = prefetch(items(), 2)
    assert next(stream) == 1
    with pytest.raises(KeyError, match="broken"):
        next(stream)


def test_sizes_are_rounded_by_a_32nd_part_at_most():
    for tokens in [*range(1, 3000), 100_000, 100_001]:
        assert 0 <= rounded(tokens) - tokens <= max(7, tokens / 32)
        assert rounded(tokens) % 8 == 0
        assert rounded(rounded(tokens)) == rounded(tokens)
    assert len({rounded(n) for n in range(1024, 2048)}) <= 33


def test_a_cut_batch_is_filled_up_anew():
    batch = collate(some_rows(()), [2, 0, 4, 1], True, pad_id=63)
    short = cut(batch, 3)
    assert short.lengths == tuple(min(3, n) for n in batch.lengths)
    assert short.input_ids.shape == (1, rounded(sum(short.lengths)))
    assert short.filler == rounded(sum(short.lengths)) - sum(short.lengths)
