"""The storage of NF4 and FP4: packed nibbles, one constant a block, the constants in 8 bits under double quantisation.

Tensors of a weight of n values, blocks of b: `packed` uint8 (ceil(n/2), 1); without double quantisation `absmax`
float32 (n/b,); with it `absmax` uint8 (n/b,), `nested_absmax` float32 (n/256b,), `offset` float32 (). Bits a
parameter: 4 + 32/b, or 4 + 8/b + 32/256b (4.5 and 4.127 at b = 64). The code points are constants of the
program and are stored nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ftrun.kernels import blockwise
from ftrun.models.quant.base import Shape, Storage


@dataclass(frozen=True)
class FourBit(Storage):
    """kind: nf4 or fp4."""

    kind: str
    block_size: int
    double_quant: bool

    @property
    def scheme(self) -> str:
        return f"{self.kind}, blocks of {self.block_size}{', double quantisation' if self.double_quant else ''}"

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        count = torch.Size(shape).numel()
        constants = blockwise.blocks(count, self.block_size)
        packed: dict[str, tuple[Shape, torch.dtype]] = {"packed": ((blockwise.blocks(count, 2), 1), torch.uint8)}
        if not self.double_quant:
            return packed | {"absmax": ((constants,), torch.float32)}
        return packed | {
            "absmax": ((constants,), torch.uint8),
            "nested_absmax": ((blockwise.blocks(constants, blockwise.NESTED_BLOCK),), torch.float32),
            "offset": ((), torch.float32),
        }

    def quantise(self, weight: torch.Tensor, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        packed, absmax = blockwise.quantise_4bit(weight, self.kind, self.block_size, device)
        if not self.double_quant:
            return {"packed": packed, "absmax": absmax}
        quantised, nested, offset = blockwise.quantise_constants(absmax)
        return {"packed": packed, "absmax": quantised, "nested_absmax": nested, "offset": offset}

    def dequantise(self, stored: Sequence[torch.Tensor], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        packed, *constants = stored
        absmax = blockwise.dequantise_constants(*constants) if self.double_quant else constants[0]
        return blockwise.dequantise_4bit(packed, absmax, self.kind, self.block_size, shape, dtype)
