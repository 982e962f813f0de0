"""AdamW over bitsandbytes: moments in 8 bits, by blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861), or paged.

bitsandbytes keeps float32 moments where a tensor has under 4,096 elements, and pages only tensors of 1e5 or more: so
a layer's small parameters are gathered into one (optim/gather.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ftrun.optim.options import OptimOptions, check_betas
from ftrun.optim.paging import PAGED_FROM, paging_note
from ftrun.schema import option


@dataclass(frozen=True)
class Options(OptimOptions):
    betas: tuple[float, ...] = option((0.9, 0.999), "decay of the first and the second moment", ge=0, lt=1)
    eps: float = option(1e-8, "added to the root of the second moment", gt=0)
    bits: int = option(8, "bits of a moment: 8 in blocks of 256 with a scale each, or 32", choices=(8, 32))
    paged: bool = option(False, "moments move to host memory under pressure (CUDA managed memory)")

    gathers_below: ClassVar[int] = PAGED_FROM

    def __post_init__(self) -> None:
        super().__post_init__()
        check_betas(self.betas)

    def notes(self, device: str) -> list[str]:
        return paging_note(f"paged_adamw_{self.bits}bit", self.paged, device)


def build(groups: list[dict[str, Any]], options: Options, device: str) -> torch.optim.Optimizer:
    """groups: params, lr and weight_decay of each. State: state1, state2 (uint8 with absmax, or float32)."""
    # imported here: bitsandbytes probes the machine for seconds, and only these jobs need it
    from ftrun.optim.blockwise import TwoMoments, make

    return make(
        TwoMoments,
        "adam",
        groups,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        optim_bits=options.bits,
        is_paged=options.paged and device == "cuda",
    )
