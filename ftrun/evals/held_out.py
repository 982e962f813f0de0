"""Held-out loss and perplexity of next-token prediction, on supervised tokens alone."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    retention_path: str | None = option(None, "a text file, to measure what tuning broke of it as well")
    latency: int = option(0, "tokens generated to time the base, the tuned and the merged model; 0: not timed", ge=0)
    agreement: bool | None = option(None, "next-token agreement and KL against the base; null: in ftrun eval alone")
    exact: str | None = option(
        None,
        "exact match of generated answers by their last number, JSON or a pattern; auto: which of the first two fits; "
        "null: auto in ftrun eval alone",
        choices=("none", "auto", "number", "json", "regex"),
    )
    pattern: str | None = option(None, "of exact=regex: what is the answer, in its first group or as a whole")
    exact_rows: int = option(32, "held-out rows that are answered at most", ge=1)
    exact_tokens: int = option(256, "tokens of such an answer at most", ge=1)
    drop: bool | None = option(None, "what quantisation costs base and tuned model; null: in ftrun eval alone")

    def __post_init__(self) -> None:
        for name in ("keep_best", "patience"):
            if getattr(self, name) and self.every is None:
                raise UserError(f"eval.{name}={getattr(self, name)}: needs eval.every=STEPS, or it never comes to act")
        _check_pattern(self.exact, self.pattern)

    def check(self) -> None:
        """UserError where the held-out text cannot be read."""
        if self.retention_path is not None and not Path(self.retention_path).expanduser().is_file():
            raise UserError(f"eval.retention_path={self.retention_path}: no such file; expected a text file")


def _check_pattern(exact: str | None, pattern: str | None) -> None:
    if exact == "regex" and not pattern:
        raise UserError("eval.exact=regex: needs eval.pattern=REGEX; its first group, or all of it, is the answer")
    if pattern is not None and exact != "regex":
        raise UserError(
            f"eval.pattern={pattern}: has no effect with eval.exact={exact or 'null'}; use eval.exact=regex"
        )
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise UserError(f"eval.pattern={pattern}: is no regular expression: {error}") from error


def evaluate(
    model: nn.Module,
    loss: Callable[[Batch], torch.Tensor],
    batches: Iterable[Batch],
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
