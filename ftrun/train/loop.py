"""The training loop. It yields plain records and knows nothing of who reads them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from ftrun.errors import Interrupted, RunFailed
from ftrun.train.generators import random_state, restore_random
from ftrun.train.interrupt import Abandoned
from ftrun.train.parallel import Alone, clip_by
from ftrun.train.ranks import Ranks
from ftrun.train.recover import Room, Steps, drop_gradients, undoing
from ftrun.values import Batch, EvalRecord, StepRecord

T = TypeVar("T")
_NAMED = 32  # rows in a message
_LONG = 5.0  # seconds: ranks ask one another within a step, a collective each time, only after one that took longer


@dataclass
class Progress:
    """Where a run stands: all that the loop itself must remember to go on."""

    step: int = 0  # optimiser steps done
    tokens: int = 0
    seconds: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None
    best_loss: float | None = None  # lowest held-out loss so far
    best_step: int | None = None
    stale: int = 0  # evaluations since then
    peak_bytes: int = 0  # largest of the run
    # steps in which memory ran out, with the rows at once and the recomputed layers from then on
    recoveries: list[dict[str, int]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)  # steps whose loss or gradients were not finite
    saves: int = 0  # checkpoints
    save_seconds: float = 0.0  # that the loop has waited for them
    unevaluated: bool = False  # the evaluation after this step was left for a request to stop


@dataclass
class Work:
    """What the loop works with. Callables, so that the loop needs no room's code."""

    model: nn.Module
    loss: Callable[[Batch], torch.Tensor]  # sum over supervised tokens, in nats
    optimiser: torch.optim.Optimizer
    trained: Sequence[torch.Tensor]  # the model's own parameters; the optimiser's may be flat ones that hold them
    rates: Sequence[float]  # each parameter group's rate at its highest
    schedule: Callable[[int], float]  # step -> multiple of those rates
    total: int  # steps of the whole run
    device: torch.device
    batches: Callable[[int], Iterator[list[Batch]]] = field(default=lambda step: iter(()))  # each step's, from one on
    memory: Callable[[], tuple[int, int]] = field(default=lambda: (0, 0))  # bytes: held now, peak of the step
    reset_peak: Callable[[], None] = field(default=lambda: None)
    gather_gradients: Callable[[], None] = field(default=lambda: None)  # from the model's to the optimiser's parameters
    holder: Callable[[torch.Tensor], torch.Tensor] = field(
        default=lambda p: p
    )  # the optimiser's parameter for a model's
    clip: float | None = None  # gradient norm at most
    foreach: bool | None = None  # clip all gradients by one call; None: as torch sees fit
    autocast: Callable[[], Any] = contextlib.nullcontext
    evaluate: Callable[[int], EvalRecord] | None = None
    evaluate_every: int | None = None
    rungs: frozenset[int] = frozenset()  # steps after which to evaluate as well
    patience: int | None = None
    save: Callable[[Progress], str | None] | None = None  # tells what went wrong, if anything did
    save_aside: Callable[[Progress], str | None] | None = None  # the same beside the loop, where it goes on
    save_best: Callable[[Progress], str | None] | None = None
    save_steps: int | None = None
    save_seconds: float | None = None
    watch: Callable[[int], Any] = field(default=lambda step: contextlib.nullcontext())  # around a step's computing
    stop: Callable[[], bool] = field(default=lambda: False)  # whether someone asked to stop
    overdue: Callable[[], bool] = field(default=lambda: False)  # and can wait no longer: the step at hand is left
    abandonable: Callable[[], Any] = contextlib.nullcontext  # raises Abandoned there by itself
    asks: bool = True  # whether ranks ask one another within a step
    ranks: Ranks = Ranks()  # noqa: RUF009 (frozen); the processes that share the step
    parallel: Alone = field(default_factory=Alone)  # how they share the model
    room: Room | None = None  # ways to need less memory; None: a step that runs out of it ends the run
    skips: int = 0  # steps that may be skipped, because their loss or gradients are not finite
    say: Callable[[str], None] = field(default=lambda text: None)
    where: Callable[[int], str] = str  # a row in words


def train(work: Work, progress: Progress) -> Iterator[StepRecord | EvalRecord]:
    """Train from `progress` to the end; yields each step's record and each evaluation's.

    Saves a checkpoint when one is due and after the last step. Raises Interrupted, with a checkpoint saved, where
    `work.stop()` turns true, a step or an evaluation that keeps it waiting undone; Abandoned where that was the first
    step; RunFailed where more than `work.skips` steps had a loss or gradients that are not finite, where memory is too
    short for one row, and where that checkpoint failed.
    """
    try:
        yield from _steps(work, progress)
    except Abandoned:
        if not progress.step or not work.save:
            raise
        raise _stopped(work, progress, _save(work.save, progress)) from None


def _steps(work: Work, progress: Progress) -> Iterator[StepRecord | EvalRecord]:
    saved_at = time.monotonic()
    work.model.train()
    if progress.unevaluated and work.evaluate:
        yield _evaluate(work, progress)
    if _is_stale(work, progress):  # it goes on from the checkpoint of an early end
        _tell_stale(work, progress)
        return
    steps = Steps(work, progress)
    for micro_batches in steps:
        record = steps.take(micro_batches, lambda batches: _step(work, batches, progress))
        _count(progress, record)
        yield record
        ended = progress.step >= work.total
        # the last step's evaluation belongs to whoever ends the run
        if not ended and work.evaluate and _evaluation_due(work, progress.step):
            yield _evaluate(work, progress)
            ended = _is_stale(work, progress)
        stop, trouble = work.ranks.any(work.stop()), None
        if work.save and (stop or ended or work.ranks.any(_save_due(work, progress, saved_at))):
            goes_on = not stop and not ended
            trouble = _save((goes_on and work.save_aside) or work.save, progress)
            saved_at = time.monotonic()
        if stop or (ended and work.ranks.any(work.stop())):
            raise _stopped(work, progress, trouble)
        if ended:
            if progress.step < work.total:
                _tell_stale(work, progress)
            return


def _tell_stale(work: Work, progress: Progress) -> None:
    evaluations = f"eval.patience={work.patience}: so many evaluations were no better than that of step"
    work.say(f"training ended after step {progress.step} of {work.total}: {evaluations} {progress.best_step}")


def _stopped(work: Work, progress: Progress, trouble: str | None) -> Exception:
    where = f"stopped after step {progress.step} of {work.total}"
    if trouble:
        return RunFailed(f"{where}, and its checkpoint could not be saved: {trouble}")
    return Interrupted(f"{where}; a checkpoint is saved, and the same command goes on from it")


def _save(save: Callable[[Progress], str | None], progress: Progress) -> str | None:
    """A checkpoint, and its cost: what the loop waits for it."""
    started = time.perf_counter()
    progress.saves += 1  # it counts itself
    if (trouble := save(progress)) is not None:
        progress.saves -= 1
    progress.save_seconds += time.perf_counter() - started
    return trouble


def _step(work: Work, micro_batches: Sequence[Batch], progress: Progress) -> StepRecord:
    """One optimiser step over its micro-batches, as if they were one batch. Raises Undone as `undoing` does."""
    started, step = time.perf_counter(), progress.step
    work.reset_peak()
    rate = work.schedule(step)
    for group, highest in zip(work.optimiser.param_groups, work.rates, strict=True):
        group["lr"] = highest * rate
    supervised, tokens = work.ranks.sums(
        [sum(b.supervised for b in micro_batches), sum(b.tokens for b in micro_batches)]
    )
    with work.watch(step):
        total, norm = _leaving(
            work, lambda: undoing(work, micro_batches, lambda batches: gradients(work, batches, supervised))
        )
        loss, size = work.ranks.sums([float(total)])[0] / supervised, float(norm)
        finite = math.isfinite(loss) and math.isfinite(size)
        update(work) if finite else drop_gradients(work)
    if not finite:
        rows = sorted(r for b in micro_batches for r in b.rows)
        _skip(work, progress, f"step {step + 1}: loss {loss}, gradient norm {size}: not finite", rows)
    seconds = time.perf_counter() - started
    *memory, slowest = work.ranks.most((*work.memory(), seconds))
    work.asks, (held, peak) = slowest > _LONG, map(int, memory)
    lr = work.rates[0] * rate
    sizes = (int(tokens), int(supervised), tokens / seconds, held, peak, seconds)
    return StepRecord(step + 1, loss, lr, size, *sizes, skipped=not finite)


def _leaving(work: Work, compute: Callable[[], T]) -> T:
    """What `compute` makes; raises Abandoned, no gradient left and the generators as they were, where it takes too
    long for a request to stop."""
    before = random_state()
    try:
        with work.abandonable():
            return compute()
    except Abandoned:
        drop_gradients(work)
        restore_random(before)
        raise


def _skip(work: Work, progress: Progress, what: str, rows: Sequence[int]) -> None:
    """The step counts, and changes nothing. Raises RunFailed where too many were such."""
    progress.skipped.append(progress.step + 1)
    more = f", … ({len(rows)} in all)" if len(rows) > _NAMED else ""
    count, named = len(progress.skipped), f"Rows of the batch: [{', '.join(map(work.where, rows[:_NAMED]))}{more}]"
    if count > work.skips:
        before = f", as were steps {progress.skipped[:-1]}: skip_nonfinite={work.skips}" if count > 1 else ""
        raise RunFailed(f"{what}{before}. {named}")
    work.say(f"WARNING: {what}: ITS UPDATE IS SKIPPED, the {count}. of at most {work.skips}. {named}")


def gradients(
    work: Work, micro_batches: Sequence[Batch], supervised: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step's gradients, accumulated and clipped; returns (this rank's sum of losses, gradient norm).

    supervised: the step's learnt tokens, over all ranks; None: those of these micro-batches.
    """
    return accumulate(work, micro_batches, supervised), clip(work)


def accumulate(work: Work, micro_batches: Sequence[Batch], supervised: float | None = None) -> torch.Tensor:
    """The gradients of the step's mean loss, summed over its micro-batches and ranks; returns this rank's sum of
    losses, in nats."""
    whole = sum(b.supervised for b in micro_batches) if supervised is None else supervised
    total = torch.zeros((), dtype=torch.float32, device=work.device)
    for number, batch in enumerate(micro_batches, 1):
        if number > 1 and work.asks and work.ranks.any(work.overdue()):
            raise Abandoned
        with work.parallel.passing(last=number == len(micro_batches)):
            with work.autocast():
                loss = work.parallel.loss(work.loss, batch.to(work.device))
            if not batch.supervised:  # a stand-in, so that all ranks take as many passes
                loss = 0.0 * loss
            # divided by the whole step's count, so that k micro-batches equal one batch
            (loss / (whole / work.parallel.factor)).backward()
        total += loss.detach()
    work.parallel.collect()
    return total


def clip(work: Work) -> torch.Tensor:
    """Scales the gradients down to `work.clip` where their norm is larger; returns the norm before."""
    norm = work.parallel.norm(work.trained)
    if norm is not None:
        return clip_by(norm, work.trained, work.clip)
    return clip_gradients(work.trained, work.clip, work.foreach)


def clip_gradients(
    parameters: Sequence[torch.Tensor], largest: float | None, foreach: bool | None = None
) -> torch.Tensor:
    """Clips the gradients of `parameters` to a norm of `largest` (None: only measures); returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(parameters, math.inf if largest is None else largest, foreach=foreach)


def update(work: Work) -> None:
    """The optimiser's step; the gradients are freed."""
    work.gather_gradients()
    work.optimiser.step()
    work.optimiser.zero_grad(set_to_none=True)


def _count(progress: Progress, record: StepRecord) -> None:
    progress.step = record.step
    progress.tokens += record.tokens
    progress.seconds += record.seconds
    if not record.skipped:
        progress.loss_first = record.loss if progress.loss_first is None else progress.loss_first
        progress.loss_last = record.loss
    progress.peak_bytes = max(progress.peak_bytes, record.mem_peak)


def _evaluate(work: Work, progress: Progress) -> EvalRecord:
    assert work.evaluate is not None
    progress.unevaluated = True
    with work.abandonable():
        record = work.evaluate(progress.step)
    progress.unevaluated = False
    before = progress.best_loss, progress.best_step
    best = progress.best_loss is None or record.loss < progress.best_loss
    progress.stale = 0 if best else progress.stale + 1
    if best:
        progress.best_loss, progress.best_step = record.loss, progress.step
        if work.save_best and _save(work.save_best, progress):
            progress.best_loss, progress.best_step = before  # what is kept is still the earlier one
    return EvalRecord(**{**record.__dict__, "best": best})


def _evaluation_due(work: Work, step: int) -> bool:
    return step in work.rungs or bool(work.evaluate_every and step % work.evaluate_every == 0)


def _is_stale(work: Work, progress: Progress) -> bool:
    return work.patience is not None and progress.stale >= work.patience


def _save_due(work: Work, progress: Progress, saved_at: float) -> bool:
    by_steps = work.save_steps is not None and progress.step % work.save_steps == 0
    by_time = work.save_seconds is not None and time.monotonic() - saved_at >= work.save_seconds
    return by_steps or by_time
