"""The imitated caching allocator: what PyTorch's own does with the same requests."""

from __future__ import annotations

import random

import pytest

from ftrun.memory.pool import MIB, CachingAllocator, OutOfMemory


def test_a_request_is_rounded_up_to_512_bytes() -> None:
    pool = CachingAllocator()
    pool.malloc(1)
    pool.malloc(513)
    assert pool.allocated == 512 + 1024


@pytest.mark.parametrize(
    ("asked", "segment"),
    [
        *((1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB)),
        *((10 * MIB, 10 * MIB), (10 * MIB + 1, 12 * MIB), (21 * MIB, 22 * MIB)),
    ],
)
def test_segments(asked: int, segment: int) -> None:
    pool = CachingAllocator()
    pool.malloc(asked)
    assert pool.reserved == segment


def test_a_rest_of_a_megabyte_or_less_is_not_split_off_a_large_block() -> None:
    pool = CachingAllocator()
    whole = pool.malloc(11 * MIB)  # of a segment of 12: 1 MiB left
    assert whole is not None
    assert whole.size == 12 * MIB == pool.allocated
    split = pool.malloc(11 * MIB - 512)
    assert split is not None
    assert split.size == 11 * MIB - 512


def test_the_smallest_block_that_fits_is_taken() -> None:
    pool = CachingAllocator()
    blocks = [pool.malloc(size * MIB) for size in (40, 12, 30)]
    for block in blocks:
        pool.free(block)
    reserved = pool.reserved
    again = pool.malloc(12 * MIB)
    assert again is blocks[1]
    assert pool.reserved == reserved


def test_neighbours_merge_when_freed() -> None:
    pool = CachingAllocator()
    parts = [pool.malloc(4 * MIB) for _ in range(5)]  # one segment of 20 MiB
    assert pool.reserved == 20 * MIB
    for part in parts:
        pool.free(part)
    assert pool.malloc(18 * MIB) is not None
    assert pool.reserved == 20 * MIB


def test_small_and_large_requests_do_not_share() -> None:
    pool = CachingAllocator()
    pool.free(pool.malloc(20 * MIB))
    pool.malloc(512)
    assert pool.reserved == 22 * MIB


def test_free_segments_are_given_back_before_it_fails() -> None:
    pool = CachingAllocator(capacity=30 * MIB)
    pool.free(pool.malloc(20 * MIB))
    pool.malloc(24 * MIB)
    assert pool.reserved == 24 * MIB
    assert pool.peak_reserved == 24 * MIB
    with pytest.raises(OutOfMemory):
        pool.malloc(20 * MIB)


def test_nothing_is_lost_or_counted_twice() -> None:
    """Random requests: allocated is the sum of the blocks out, and all that is free merges back into segments."""
    random.seed(0)
    pool, out = CachingAllocator(), []
    for _ in range(3000):
        if out and random.random() < 0.5:
            pool.free(out.pop(random.randrange(len(out))))
        else:
            out.append(pool.malloc(random.choice([700, 300_000, 3 * MIB, 15 * MIB, 33 * MIB]) + random.randrange(9999)))
        assert pool.allocated == sum(b.size for b in out if b is not None) <= pool.reserved <= pool.peak_reserved
    for block in out:
        pool.free(block)
    assert pool.allocated == 0
    pool.empty_cache()
    assert pool.reserved == 0


def test_nothing_asked_for_takes_nothing() -> None:
    pool = CachingAllocator()
    assert pool.malloc(0) is None
    pool.free(None)
    assert pool.reserved == 0
