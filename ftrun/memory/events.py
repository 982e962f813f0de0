"""The allocator's own events over one step on the CPU: what was really allocated, told by nobody's model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Allocations:
    """What the allocator did within the block: its highest and its last level above the start, in bytes."""

    peak: int = 0
    end: int = 0


@contextmanager
def allocations() -> Iterator[Allocations]:
    """Record every allocation and release of the CPU's allocator within the block, through torch's profiler.

    The releases of blocks older than the block count as negative: have none, or know them.
    """
    seen = Allocations()
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _quiet():
        profile.__enter__()
    try:
        yield seen
    finally:
        with _quiet():
            profile.__exit__(None, None, None)
        level = 0
        recorded: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
        for event in recorded.events():
            if event.name() == "[memory]":
                level += event.nbytes()
                seen.peak = max(seen.peak, level)
        seen.end = level


def resident_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of the distinct storages behind `tensors`."""
    own = (getattr(t, "_local_tensor", t) for t in tensors)  # of a sharded tensor: the part that lies here
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in own}
    return sum(storages.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library writes to the process's standard error; keep it off the user's screen."""
    with tempfile.TemporaryFile() as sink:
        before = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
