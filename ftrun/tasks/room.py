"""What memory a run has room for on its way: rows at once, in training and in evaluations, and a checkpoint's copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ftrun import assemble, stepping
from ftrun.evals.held_out import evaluate
from ftrun.memory import host
from ftrun.memory.device import SHARE
from ftrun.train.interrupt import Abandoned
from ftrun.train.recover import Room, halving
from ftrun.values import Batch, EvalRecord

if TYPE_CHECKING:
    from ftrun.tasks.session import Session


def copies(session: Session) -> bool:
    """Whether there is room for a checkpoint's copy: beside the planned peak, or on a GPU's host."""
    plan = session.settled.plan
    if session.device.type == "cpu":
        return plan.copies
    return plan.checkpoint_copy_bytes < SHARE["cpu"] * host.memory()[1]


def room_of(session: Session) -> Room:
    """What a step computes at once: as settled, or as an earlier part of the run came to for want of memory."""
    settled, before, parts = session.settled, session.progress.recoveries, session.parts
    found = before[-1] if before else {"micro_batch": settled.micro_batch, "recomputed": settled.recomputed}
    room = Room(
        micro_batch=min(found["micro_batch"], settled.micro_batch),
        recomputed=max(found["recomputed"], settled.recomputed),
        layers=len(assemble.decoder(parts)) - assemble.frozen_below(parts),
        recompute=lambda layers: assemble.recompute_first(parts, layers),
        changed=session.keep_no_more,
        say=session.console.say,
        where=session.corpus.train.where,
    )
    if before:
        room.recompute(room.recomputed)
        session.console.say(
            f"memory ran out in step {before[-1]['step']}: goes on with {room.micro_batch} rows at once, "
            f"{room.recomputed} layers recomputed"
        )
    return room


def less(session: Session) -> str:
    """The settings with which the job needs less memory, as they are typed; "" where there are none."""
    job, settled, parts = session.job, session.settled, session.parts
    rows, share = settled.micro_batch, job.batch // job.devices
    if rows > 1:
        return f"micro_batch={max(n for n in range(1, rows // 2 + 1) if share % n == 0)}"
    layers = len(assemble.decoder(parts)) - assemble.frozen_below(parts)
    return "checkpointing=all" if settled.recomputed < layers else ""


class Evaluations:
    """The held-out loss, in batches of the micro-batch's rows, or from a want of memory on of fewer."""

    def __init__(self, session: Session) -> None:
        self.session, self.rows = session, session.settled.micro_batch
        self._batches: dict[int, Sequence[Batch]] = {}

    def at(self, step: int) -> EvalRecord:
        """The evaluation at a step."""
        if not self.session.ranks.alone:  # all ranks take as many passes
            return self._with(self.rows, step)
        record, self.rows = halving(self.rows, lambda rows: self._with(rows, step), self.session.console.say)
        return record

    def _with(self, rows: int, step: int) -> EvalRecord:
        s = self.session
        if rows not in self._batches:
            self._batches[rows] = stepping.evaluation_batches(s.job, s.corpus, s.options.rows, rows, s.pad_id, s.ranks)
        if s.ranks.alone:
            return evaluate(s.work.model, s._loss, self._batches[rows], step)
        return evaluate(s.work.model, s._loss, self._asking(self._batches[rows]), step, sums=s.ranks.sums)

    def _asking(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """The batches, as long as no rank has to leave the evaluation; all of them then raise Abandoned."""
        for batch in batches:
            if self.session.ranks.any(self.session.work.overdue()):
                raise Abandoned
            yield batch
