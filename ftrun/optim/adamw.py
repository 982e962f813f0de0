"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2): two float32 moments a weight, 8 bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ftrun.optim.options import OptimOptions, check_betas
from ftrun.schema import option


@dataclass(frozen=True)
class Options(OptimOptions):
    betas: tuple[float, ...] = option((0.9, 0.999), "decay of the first and the second moment", ge=0, lt=1)
    eps: float = option(1e-8, "added to the root of the second moment", gt=0)
    engine: str = option(
        "fused",
        "fused: one kernel, no temporaries; foreach: one launch for all tensors, temporaries of their size; loop",
        choices=("fused", "foreach", "loop"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_betas(self.betas)


def build(groups: list[dict[str, Any]], options: Options, device: str) -> torch.optim.Optimizer:
    """groups: params, lr and weight_decay of each. State: exp_avg and exp_avg_sq, of each parameter's dtype."""
    return torch.optim.AdamW(
        groups,
        betas=(options.betas[0], options.betas[1]),
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=options.engine == "fused",
        foreach=options.engine == "foreach",
    )
