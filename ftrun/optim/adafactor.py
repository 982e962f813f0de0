"""Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): the second moment as a row and a column, 4(r + c) bytes.

transformers' implementation and not torch's: torch's always scales the rate by the weights' own size, which is zero
for LoRA's B at the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ftrun.optim.options import OptimOptions
from ftrun.schema import option


@dataclass(frozen=True)
class Options(OptimOptions):
    eps: float = option(1e-30, "added to the squared gradient", gt=0)
    update_clip: float = option(1.0, "largest root mean square of a tensor's update, over its rate", gt=0)
    decay: float = option(0.8, "the second moment's memory: 1 - step^-decay", gt=0, lt=1)
    momentum: float | None = option(None, "decay of a first moment (4 bytes a weight more); null = none", ge=0, lt=1)
    scale_by_weights: bool = option(False, "the rate times the weights' root mean square, as in the paper")

    by_tensor: ClassVar[bool] = True


def build(groups: list[dict[str, Any]], options: Options, device: str) -> torch.optim.Optimizer:
    """groups: params, lr and weight_decay of each. State: exp_avg_sq_row and exp_avg_sq_col, float32."""
    from transformers.optimization import Adafactor

    return Adafactor(
        groups,
        lr=groups[0]["lr"],
        eps=(options.eps, 1e-3),
        clip_threshold=options.update_clip,
        decay_rate=-options.decay,
        beta1=options.momentum,
        weight_decay=options.weight_decay,
        scale_parameter=options.scale_by_weights,
        relative_step=False,
    )
