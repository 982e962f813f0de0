"""Sums of matrix products that are rounded once: gain · (x₁ w₁ + x₂ w₂ + …) + bias.

A LoRA update is small beside its base. Added to a product that is already rounded to bfloat16, most of it is less than
half a step of that grid and is lost; summed in float32 and rounded once, it is not. On AMX tiles that is one kernel;
elsewhere each product is added in its own rounding, as everywhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ftrun.kernels import compiled

TILE = 32  # what the sizes that are summed over must be multiples of, for the kernel
_MOST = 8  # products in one sum


def tile(x: torch.Tensor) -> int:
    """What sizes that are summed over are best multiples of, for inputs like x."""
    return TILE if _by_tiles(x) else 1


def filled(size: int, tile: int) -> int:
    """The size, filled up to whole tiles."""
    return -(-size // tile) * tile


def product(
    inputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    turned: bool,
    bias: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """gain · (Σ xᵢ wᵢ) + bias: (T, out), in the dtype of the inputs, without a graph.

    inputs (T, kᵢ); weights (out, kᵢ) where turned, else (kᵢ, out); bias (out,); gain (out,) float32.
    """
    if _tiled(*inputs, *weights):
        found: torch.Tensor = torch.ops.ftrun.linear(list(inputs), list(weights), turned, bias, gain)
        return found
    first = bias if gain is None else None
    out = F.linear(inputs[0], weights[0] if turned else weights[0].T, first)
    for x, weight in zip(inputs[1:], weights[1:], strict=True):
        out.addmm_(x, weight.T if turned else weight)
    if gain is not None:  # a gain near 1 must not be rounded to 16 bits itself
        out.addcmul_(out, (gain - 1).to(out.dtype))
        out = out if bias is None else out.add_(bias)
    return out


def _tiled(*tensors: torch.Tensor) -> bool:
    """Whether the kernel takes them."""
    inputs = tensors[: len(tensors) // 2]
    return (
        0 < len(inputs) <= _MOST
        and inputs[0].shape[0] > 0
        and all(_by_tiles(t) for t in tensors)
        and all(x.shape[1] % TILE == 0 for x in inputs)
    )


def _by_tiles(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16 and compiled.place(x) == "cpu" and compiled.tiles_at_hand()


def _linear(
    inputs: list[torch.Tensor],
    weights: list[torch.Tensor],
    turned: bool,
    bias: torch.Tensor | None,
    gain: torch.Tensor | None,
) -> torch.Tensor:
    inputs = [x if x.stride(1) == 1 else x.contiguous() for x in inputs]
    out, table, kept, depth = _out(inputs, weights, turned), [], [], 0
    for x, weight in zip(inputs, weights, strict=True):
        # a matrix that lies turned over (Conv1D's) is read as it lies
        across = weight.stride(1) != 1
        lying = weight.T if across else weight
        if lying.stride(1) != 1 or lying.stride(0) % 2:  # gaps, or rows that begin amid two numbers
            lying = lying.contiguous()
        kept.append(lying)
        table += [x.data_ptr(), x.stride(0), x.shape[1], lying.data_ptr(), lying.stride(0), int(turned != across)]
        depth += x.shape[1]
    room = torch.empty(scratch_bytes(out.shape[0], out.shape[1], depth), dtype=torch.uint8)
    sizes = (*out.shape, len(inputs), (ctypes.c_int64 * len(table))(*table), depth)
    compiled.call("linear", *sizes, bias, gain, out, room[-room.data_ptr() % 64 :])
    return out


def scratch_bytes(rows: int, columns: int, depth: int) -> int:
    """What the kernel works in: the weights in panels, and each thread's part of the inputs and its sums."""
    return compiled.scratch("linear", rows, columns, depth, torch.get_num_threads()) + 64


def _out(inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], turned: bool, *more: Any) -> torch.Tensor:
    return inputs[0].new_empty(inputs[0].shape[0], weights[0].shape[0 if turned else 1])


def _register() -> None:
    given = "Tensor[] inputs, Tensor[] weights, bool turned, Tensor? bias, Tensor? gain"
    torch.library.define("ftrun::linear", f"({given}) -> Tensor")
    torch.library.impl("ftrun::linear", "default", _linear)
    torch.library.register_fake("ftrun::linear", _out)


_register()
