"""NF4: 16 quantiles of a normal distribution (QLoRA, Dettmers et al. 2023), as bitsandbytes stores them."""

from __future__ import annotations

from dataclasses import dataclass

from ftrun.models.quant.base import Quantiser as Base
from ftrun.models.quant.four_bit import FourBit
from ftrun.schema import option

BLOCKS = (32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Options:
    """How the weights are stored."""

    double_quant: bool = option(True, "keep the blocks' constants in 8 bits (saves 0.37 bits a parameter)")
    block_size: int = option(64, "values that share a constant", choices=BLOCKS)
    skip: list[str] = option([], "module suffixes kept in full precision, such as down_proj")


class Quantiser(Base):
    """NF4 in blocks, 4.127 bits a parameter with the defaults, 4.5 without double quantisation."""

    kind = "nf4"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.storage = FourBit("nf4", options.block_size, options.double_quant)
