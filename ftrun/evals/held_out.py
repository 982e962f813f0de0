"""Held-out loss and perplexity of next-token prediction, on supervised tokens alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.errors import UserError
from ftrun.schema import option
from ftrun.values import Batch, EvalRecord

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Options:
    """When to evaluate, on how much, and what follows from it."""

    evaluates: ClassVar[bool] = True
    every: int | None = option(None, "evaluate each so many steps; null: before and after only", ge=1)
    rows: int | None = option(100, "held-out rows at most; null: all of them", ge=1)
    before: bool = option(True, "evaluate the untuned base as well")
    keep_best: bool = option(False, "keep the best trained weights by held-out loss and hand those over")
    patience: int | None = option(None, "stop after so many evaluations without a better one", ge=1)
    prompt: str | None = option(None, "answered before and after; null: the first held-out row's own")
    max_new_tokens: int = option(48, "tokens of that answer at most; 0: no answer", ge=0)
    retention: int = option(16, "rows that the untuned base writes, to measure what tuning broke; 0: none", ge=0)
    retention_tokens: int = option(64, "tokens of such a row at most", ge=1)
    latency: int = option(0, "tokens generated to time the base, the tuned and the merged model; 0: not timed", ge=0)

    def __post_init__(self) -> None:
        for name in ("keep_best", "patience"):
            if getattr(self, name) and self.every is None:
                raise UserError(f"eval.{name}={getattr(self, name)}: needs eval.every=STEPS, or it never comes to act")


def evaluate(
    model: nn.Module,
    loss: Callable[[Batch], torch.Tensor],
    batches: Sequence[Batch],
    step: int,
    sums: Callable[[Sequence[float]], list[float]] = list,
) -> EvalRecord:
    """The mean loss over the supervised tokens of `batches`, in nats, and exp of it; dropout off, no gradient.

    sums: over all processes that evaluate batches of their own. A batch without supervised tokens counts for nothing.
    A perplexity beyond float64 is reported as infinity's nearest number, since JSON has no infinity.
    """
    import torch

    started, total, count = time.perf_counter(), 0.0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            found = float(loss(batch))
            total += found if batch.supervised else 0.0
            count += batch.supervised
    model.train(was_training)
    total, tokens = sums([total, float(count)])
    count = int(tokens)
    mean = total / max(count, 1)
    return EvalRecord(step, mean, math.exp(min(mean, 700.0)), count, time.perf_counter() - started)
