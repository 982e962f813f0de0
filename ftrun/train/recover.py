"""Where memory runs out in a step: it is undone, and taken again with fewer rows at once, or more layers recomputed.

The step keeps its rows and its gradients, which are sums over rows however these are cut into micro-batches. What was
changed holds from then on, and is part of the run's progress: a run that goes on does so with it.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ftrun.errors import RunFailed, is_out_of_memory
from ftrun.memory.host import change_pages, give_back
from ftrun.train.generators import random_state, restore_random
from ftrun.values import Batch

if TYPE_CHECKING:
    from ftrun.train.loop import Progress, Work

T = TypeVar("T")


@dataclass
class Room:
    """How much of a step is computed at once, and the ways to less.

    recompute: has so many decoder layers, from the lowest trained one on, computed again in the backward pass.
    changed: hears of a change before the step's batches are made again. where: a row in words.
    """

    micro_batch: int
    recomputed: int
    layers: int  # that can be recomputed
    recompute: Callable[[int], None]
    changed: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda text: None
    where: Callable[[int], str] = str


class Undone(Exception):
    """Memory ran out, and nothing is left of the step. batch: the one at hand."""

    def __init__(self, batch: Batch, why: str) -> None:
        super().__init__(why)
        self.batch = batch


class _Noted(list[Batch]):
    """Micro-batches that remember which of them is at hand."""

    at: Batch

    def __iter__(self) -> Iterator[Batch]:
        for self.at in super().__iter__():
            yield self.at


def undoing(work: Work, micro_batches: Sequence[Batch], compute: Callable[[Sequence[Batch]], T]) -> T:
    """What `compute` makes of the micro-batches, which must change gradients and generators alone.

    Raises Undone, with both as they were, where memory runs out; the error itself where the run has no `room`.
    """
    room = work.room
    if room is None:
        return compute(micro_batches)
    before, noted = random_state(), _Noted(micro_batches)
    try:
        found = compute(noted)
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        why = " ".join(str(error).split())[:200] or type(error).__name__
        traceback.clear_frames(error.__traceback__)  # they hold the step's tensors
    else:
        return found
    drop_gradients(work)
    restore_random(before)
    gc.collect()
    change_pages()  # pages that are kept come in pieces, which do not fit the next tensors
    give_back()
    raise Undone(noted.at, why)


def drop_gradients(work: Work) -> None:
    """No gradient is left, in the model or in the optimiser."""
    work.optimiser.zero_grad(set_to_none=True)
    for parameter in work.trained:
        parameter.grad = None


class Steps:
    """The steps' micro-batches from where a run stands; a step that memory is too short for is made again, smaller."""

    def __init__(self, work: Work, progress: Progress) -> None:
        self.work, self.progress = work, progress
        self._made = work.batches(progress.step)

    def __iter__(self) -> Iterator[list[Batch]]:
        while (batches := next(self._made, None)) is not None:
            yield batches

    def take(self, batches: Sequence[Batch], step: Callable[[Sequence[Batch]], T]) -> T:
        """What `step` makes of the batches. Raises RunFailed, naming the row, where not even one of them fits."""
        while True:
            try:
                return step(batches)
            except Undone as undone:
                at, why = undone.batch, str(undone)
            close = getattr(self._made, "close", None)
            if close is not None:  # a thread that makes batches ends before what it reads is let go
                close()
            self._lessen(at, why)
            self._made = self.work.batches(self.progress.step)
            batches = next(self._made)

    def _lessen(self, batch: Batch, why: str) -> None:
        room, step = self.work.room, self.progress.step + 1
        assert room is not None
        if room.micro_batch > 1:
            rows, room.micro_batch = room.micro_batch, (room.micro_batch + 1) // 2
            change = f"{room.micro_batch} rows at once instead of {rows}"
        elif room.recomputed < room.layers:
            rest = room.layers - room.recomputed
            room.recomputed += (rest + 1) // 2
            change = f"{room.recomputed} layers recomputed instead of {room.layers - rest}"
        else:
            longest = max(range(len(batch.rows)), key=lambda i: batch.lengths[i])
            raise RunFailed(
                f"step {step}: out of memory: one row does not fit, {room.layers} layers recomputed: "
                f"{room.where(batch.rows[longest])}, of {batch.lengths[longest]} tokens ({why})"
            )
        room.recompute(room.recomputed)
        room.changed()
        self.progress.recoveries.append({"step": step, "micro_batch": room.micro_batch, "recomputed": room.recomputed})
        room.say(f"WARNING: step {step}: OUT OF MEMORY ({why}): it is taken again, and the rest, with {change}")


def halving(rows: int, compute: Callable[[int], T], say: Callable[[str], None]) -> tuple[T, int]:
    """(what `compute` makes with so many rows at once, how many they were in the end): half, where memory runs out."""
    while True:
        try:
            return compute(rows), rows
        except (RuntimeError, MemoryError, OSError) as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
        rows = (rows + 1) // 2
        gc.collect()
        change_pages()
        give_back()
        say(f"warning: out of memory in an evaluation: it goes on with {rows} rows at once")
