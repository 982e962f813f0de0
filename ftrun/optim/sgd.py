"""Stochastic gradient descent with momentum: 4 bytes a weight, none without momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ftrun.errors import UserError
from ftrun.optim.options import OptimOptions
from ftrun.schema import option


@dataclass(frozen=True)
class Options(OptimOptions):
    momentum: float = option(0.9, "share of the last update that is kept; 0 = no state", ge=0, lt=1)
    nesterov: bool = option(False, "look ahead along the momentum")

    by_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise UserError("optim.nesterov=true: expected optim.momentum above 0 with it, found 0")


def build(groups: list[dict[str, Any]], options: Options, device: str) -> torch.optim.Optimizer:
    """groups: params, lr and weight_decay (coupled here: added to the gradient) of each."""
    return torch.optim.SGD(
        groups, momentum=options.momentum, nesterov=options.nesterov, weight_decay=options.weight_decay, fused=True
    )
