"""PyTorch's CUDA caching allocator, imitated: what is allocated and reserved after a sequence of requests.

Rules and constants: c10/cuda/CUDACachingAllocator.cpp (torch 2.4 to 2.13) with its default settings: one stream, no
expandable segments, no limit on splitting.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

MIB = 1 << 20
BLOCK = 512  # kMinBlockSize: every request is rounded up to a multiple of this, bytes
SMALL = MIB  # kSmallSize: requests up to this come from the small pool
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # kLargeBuffer: the segment of requests between kSmallSize and kMinLargeAlloc
MIN_LARGE = 10 * MIB  # kMinLargeAlloc
ROUND_LARGE = 2 * MIB  # kRoundLarge: larger requests get a segment of their own, rounded up to this


class OutOfMemory(Exception):
    """A request does not fit the capacity, after every free segment was given back. Both figures in bytes."""

    def __init__(self, asked: int, capacity: int) -> None:
        super().__init__(f"{asked} bytes do not fit the {capacity} there are")
        self.asked, self.capacity = asked, capacity


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment, free or handed out; size and address in bytes."""

    address: int
    size: int
    small: bool
    free: bool = True
    before: Block | None = None
    after: Block | None = None


class CachingAllocator:
    """Counts `allocated` and `reserved` bytes and their peaks, as torch.cuda.memory_allocated and _reserved do.

    capacity: bytes of the device left for segments; None for no limit. Wholly free segments are given back before a
    request fails (OutOfMemory).
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}  # by size, then address
        self._next = 0

    def malloc(self, nbytes: int) -> Block | None:
        """A block of at least so many bytes; None for 0 bytes, as on CUDA."""
        if nbytes == 0:
            return None
        size = -(-nbytes // BLOCK) * BLOCK
        block = self._cached(size) or self._segment(size)
        self._split(block, size)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block | None) -> None:
        """Back into the cache, merged with its free neighbours."""
        if block is None:
            return
        self.allocated -= block.size
        block.free = True
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._take(other)
                block = _merge(block, other)
        self._put(block)

    def reset_peaks(self) -> None:
        """As torch.cuda.reset_peak_memory_stats."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def empty_cache(self) -> None:
        """Give back every segment that is wholly free."""
        for pool in self._free.values():
            for entry in [e for e in pool if e[2].before is None and e[2].after is None]:
                pool.remove(entry)
                self.reserved -= entry[0]

    def _cached(self, size: int) -> Block | None:
        """The smallest free block that is large enough: best fit, lowest address first."""
        pool = self._free[size <= SMALL]
        at = bisect.bisect_left(pool, (size, -1))
        return pool.pop(at)[2] if at < len(pool) else None

    def _segment(self, size: int) -> Block:
        """A new segment, after cudaMalloc's rounding."""
        small = size <= SMALL
        whole = SMALL_SEGMENT if small else LARGE_SEGMENT if size < MIN_LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.capacity is not None and self.reserved + whole > self.capacity:
            self.empty_cache()
            if self.reserved + whole > self.capacity:
                raise OutOfMemory(size, self.capacity)
        self.reserved += whole
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        block = Block(self._next, whole, small)
        self._next += whole + BLOCK  # segments never merge
        return block

    def _split(self, block: Block, size: int) -> None:
        """The rest becomes a free block where it is large enough to be worth it (should_split)."""
        rest = block.size - size
        if rest < BLOCK if block.small else rest <= SMALL:
            return
        tail = Block(block.address + size, rest, block.small, True, block, block.after)
        if block.after is not None:
            block.after.before = tail
        block.after, block.size = tail, size
        self._put(tail)

    def _put(self, block: Block) -> None:
        bisect.insort(self._free[block.small], (block.size, block.address, block))

    def _take(self, block: Block) -> None:
        pool = self._free[block.small]
        del pool[bisect.bisect_left(pool, (block.size, block.address))]


def _merge(one: Block, other: Block) -> Block:
    """Two neighbours as one free block."""
    low, high = (one, other) if one.address < other.address else (other, one)
    low.size += high.size
    low.after = high.after
    if high.after is not None:
        high.after.before = low
    return low
