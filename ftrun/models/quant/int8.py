"""int8: each row (output unit) in 8 bits with one float32 magnitude, weights only.

The stored bytes are LLM.int8()'s (Dettmers et al. 2022) of the same weight; the product is not: LLM.int8() also
rounds the activations to 8 bits, except in outlier columns, while here the weight is made dense in the activations'
own dtype. So the error is that of the weight alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ftrun.kernels import blockwise
from ftrun.models.quant.base import Quantiser as Base
from ftrun.models.quant.base import Shape, Storage
from ftrun.schema import option


@dataclass(frozen=True)
class Options:
    """How the weights are stored."""

    skip: list[str] = option([], "module suffixes kept in full precision, such as down_proj")


@dataclass(frozen=True)
class Int8(Storage):
    """`packed` int8 of the weight's shape, `absmax` float32 of the shape less its last size."""

    @property
    def scheme(self) -> str:
        return "int8 rows"

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"packed": (shape, torch.int8), "absmax": (shape[:-1], torch.float32)}

    def quantise(self, weight: torch.Tensor, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        packed, absmax = blockwise.quantise_int8(weight, device)
        return {"packed": packed, "absmax": absmax}

    def dequantise(self, stored: Sequence[torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return blockwise.dequantise_int8(stored[0], stored[1], dtype)


class Quantiser(Base):
    """8 bits and one constant a row: 8.008 bits a parameter at 4096 columns."""

    kind = "int8"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.storage = Int8()
