"""What the planned step really took, beside what it was planned to take."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ftrun.memory.events import allocations, resident_bytes

if TYPE_CHECKING:
    from ftrun.tasks.session import Session


class Peak:
    """figures: result.json's `memory`: planned and measured bytes of the same step, and how far apart they are."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.figures: dict[str, Any] = {}
        self._began = 0  # the step that this process began with

    def begin(self, step: int) -> None:
        """Where this process begins, if it is not at the run's first step: its engine has yet to settle."""
        self._began = step if not self.session.ranks.alone else 0

    @contextlib.contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Measure the step that the plan was made for: by the allocator's own events, on CUDA by its statistics."""
        s = self.session
        # with fewer rows at once it is not the planned one
        early = step < s.work.parallel.settled + self._began
        if step != s.settled.largest_step or early or s.progress.recoveries:
            yield
        elif s.device.type == "cuda":
            yield  # the loop has reset the statistics at the step's start; paged state is not among them
            self._note(s.settled.plan.needed_bytes, torch.cuda.max_memory_allocated())
        else:
            s.keeper.finish()  # its copy is not of the step
            gc.collect()  # what the steps before left would be freed within this one, unseen by the profiler
            resident = resident_bytes(self._residents()) + s.work.parallel.held_bytes
            with allocations() as seen:
                yield
            self._note(s.settled.plan.peak_bytes, resident + seen.peak)

    def _residents(self) -> Iterator[torch.Tensor]:
        s = self.session
        yield from s.work.model.parameters()
        yield from s.work.model.buffers()
        yield from () if s.kept is None else s.kept.store.residents()
        for state in s.work.optimiser.state.values():
            yield from (v for v in state.values() if isinstance(v, torch.Tensor))

    def _note(self, planned: int, measured: int) -> None:
        """Of several ranks the fullest one's."""
        measured = int(self.session.ranks.most([measured])[0])
        self.figures.update(
            planned_peak_bytes=planned, measured_peak_bytes=measured, error=(planned - measured) / measured
        )
