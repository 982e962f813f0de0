"""The learning rate over a run, as a multiple of each group's own rate. Pure: a step number in, a number out."""

from __future__ import annotations

import math

from ftrun.errors import UserError
from ftrun.optim.options import OptimOptions


def rate(step: int, total: int, options: OptimOptions) -> float:
    """The multiplier, 0 < rate <= 1, for optimiser step `step` (0 is the first) of a run of `total` steps.

    Equal to transformers' `get_scheduler` values after the warm-up. In the warm-up of w steps the rate is
    (step + 1)/(w + 1), where transformers has step/w: there the first step of every run would learn nothing.
    Raises UserError where the warm-up is no shorter than the run.
    """
    rising = warmup_steps(total, options)
    if step < rising:
        return (step + 1) / (rising + 1)
    if options.schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, total - rising)
    if options.schedule == "linear":
        return max(0.0, 1.0 - done)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


def warmup_steps(total: int, options: OptimOptions) -> int:
    """The number of steps of rising rate in a run of `total`; at least one step is left at the full rate."""
    if options.warmup < 1:
        return min(math.ceil(options.warmup * total), total - 1)
    if options.warmup >= total:
        raise UserError(
            f"optim.warmup={options.warmup}: expected fewer steps than the run's {total}, or a fraction below 1"
        )
    return int(options.warmup)
