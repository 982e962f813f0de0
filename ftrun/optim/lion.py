"""Lion (Chen et al. 2023, arXiv:2302.06675): the sign of one moment. 4 bytes a weight, 1 in 8 bits.

Its updates are larger than Adam's: the paper takes a rate 3 to 10 times smaller. By bitsandbytes, which keeps a
float32 moment where a tensor has under 4,096 elements, and pages only tensors of 1e5 or more: so a layer's small
parameters are gathered into one (optim/gather.py).
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
    betas: tuple[float, ...] = option((0.9, 0.99), "weight of the moment in the update, and its decay", ge=0, lt=1)
    bits: int = option(32, "bits of the moment: 8 in blocks of 256 with a scale each, or 32", choices=(8, 32))
    paged: bool = option(False, "the moment moves to host memory under pressure (CUDA managed memory)")

    gathers_below: ClassVar[int] = PAGED_FROM

    def __post_init__(self) -> None:
        super().__post_init__()
        check_betas(self.betas)

    def notes(self, device: str) -> list[str]:
        return paging_note(f"paged_lion_{self.bits}bit", self.paged, device)


def build(groups: list[dict[str, Any]], options: Options, device: str) -> torch.optim.Optimizer:
    """groups: params, lr and weight_decay of each. State: state1 (uint8 with absmax, or float32)."""
    # imported here: bitsandbytes probes the machine for seconds, and only these jobs need it
    from ftrun.optim.blockwise import OneMoment, make

    return make(
        OneMoment,
        "lion",
        groups,
        betas=options.betas,
        eps=0.0,
        weight_decay=options.weight_decay,
        optim_bits=options.bits,
        is_paged=options.paged and device == "cuda",
    )
