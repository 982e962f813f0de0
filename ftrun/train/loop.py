"""The training loop. It yields plain records and knows nothing of who reads them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ftrun.errors import Interrupted, RunFailed
from ftrun.train.parallel import Alone, clip_by
from ftrun.train.ranks import Ranks
from ftrun.values import Batch, EvalRecord, StepRecord


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
    save_best: Callable[[Progress], str | None] | None = None
    save_steps: int | None = None
    save_seconds: float | None = None
    watch: Callable[[int], Any] = field(default=lambda step: contextlib.nullcontext())  # around a step's computing
    stop: Callable[[], bool] = field(default=lambda: False)  # whether someone asked to stop
    ranks: Ranks = Ranks()  # noqa: RUF009 (frozen); the processes that share the step
    parallel: Alone = field(default_factory=Alone)  # how they share the model


def train(work: Work, progress: Progress) -> Iterator[StepRecord | EvalRecord]:
    """Train from `progress` to the end; yields each step's record and each evaluation's.

    Saves a checkpoint when one is due and after the last step. Raises Interrupted, with a checkpoint saved, where
    `work.stop()` turns true; RunFailed on a loss or gradient that is not finite, and where that checkpoint failed.
    """
    saved_at = time.monotonic()
    work.model.train()
    if _is_stale(work, progress):  # it goes on from the checkpoint of an early end
        return
    for micro_batches in work.batches(progress.step):
        record = _step(work, micro_batches, progress.step)
        _count(progress, record)
        yield record
        ended = progress.step >= work.total
        # the last step's evaluation belongs to whoever ends the run
        if not ended and work.evaluate and _evaluation_due(work, progress.step):
            yield _evaluate(work, progress)
            ended = _is_stale(work, progress)
        stop, trouble = work.ranks.any(work.stop()), None
        if work.save and (stop or ended or work.ranks.any(_save_due(work, progress, saved_at))):
            trouble = work.save(progress)
            saved_at = time.monotonic()
        if stop or (ended and work.ranks.any(work.stop())):
            raise _stopped(work, progress, trouble)
        if ended:
            return


def _stopped(work: Work, progress: Progress, trouble: str | None) -> Exception:
    where = f"stopped after step {progress.step} of {work.total}"
    if trouble:
        return RunFailed(f"{where}, and its checkpoint could not be saved: {trouble}")
    return Interrupted(f"{where}; a checkpoint is saved, and the same command goes on from it")


def _step(work: Work, micro_batches: Sequence[Batch], step: int) -> StepRecord:
    """One optimiser step over its micro-batches, as if they were one batch."""
    started = time.perf_counter()
    work.reset_peak()
    rate = work.schedule(step)
    for group, highest in zip(work.optimiser.param_groups, work.rates, strict=True):
        group["lr"] = highest * rate
    supervised, tokens = work.ranks.sums(
        [sum(b.supervised for b in micro_batches), sum(b.tokens for b in micro_batches)]
    )
    with work.watch(step):
        total, norm = gradients(work, micro_batches, supervised)
        loss, size = work.ranks.sums([float(total)])[0] / supervised, float(norm)
        if math.isfinite(loss) and math.isfinite(size):
            update(work)
    if not (math.isfinite(loss) and math.isfinite(size)):
        rows = sorted(r for b in micro_batches for r in b.rows)
        raise RunFailed(f"step {step + 1}: loss {loss}, gradient norm {size}: not finite. Rows of the batch: {rows}")
    seconds = time.perf_counter() - started
    held, peak = map(int, work.ranks.most(work.memory()))
    lr = work.rates[0] * rate
    return StepRecord(step + 1, loss, lr, size, int(tokens), int(supervised), tokens / seconds, held, peak, seconds)


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
    progress.loss_first = record.loss if progress.loss_first is None else progress.loss_first
    progress.loss_last = record.loss
    progress.peak_bytes = max(progress.peak_bytes, record.mem_peak)


def _evaluate(work: Work, progress: Progress) -> EvalRecord:
    assert work.evaluate is not None
    record = work.evaluate(progress.step)
    before = progress.best_loss, progress.best_step
    best = progress.best_loss is None or record.loss < progress.best_loss
    progress.stale = 0 if best else progress.stale + 1
    if best:
        progress.best_loss, progress.best_step = record.loss, progress.step
        if work.save_best and work.save_best(progress):
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
