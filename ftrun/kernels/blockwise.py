"""Quantising a weight and making it dense again: 4-bit blocks (NF4, FP4) and 8-bit rows. Pure tensor functions.

4 bits (QLoRA, Dettmers et al. 2023, section 3): the flat weight is cut into blocks; each block is divided by its
largest magnitude (the constant, float32) and each value becomes the index of the nearest of 16 code points; two
indices share a byte, the first in the high half. Double quantisation stores the constants themselves in 8 bits: less
their mean, in blocks of 256, against bitsandbytes' dynamic map. Bytes and constants equal bitsandbytes' own.

8 bits: each row (output unit) is divided by its largest magnitude and rounded to -127 … 127, as LLM.int8() stores
weights (Dettmers et al. 2022, section 2.1); activations stay as they are.

Two operators are registered with stand-ins for fake tensors: `ftrun::dequantise_constants`, `ftrun::dequantise_int8`.
"""

from __future__ import annotations

import functools
import logging
import math

import torch

# on some CPUs it says at import that an optional package of inference kernels is absent
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
import bitsandbytes.functional as bnb  # noqa: E402

from ftrun.kernels import compiled, pages  # noqa: E402

NESTED_BLOCK = 256  # constants to one constant of their own, under double quantisation
INT8_MAX = 127
_CHUNK = 1 << 19  # values quantised at once: bounds the float32 copies; a multiple of every block size

# QLoRA, appendix E: quantiles of a normal distribution, zero among them
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# sign, two bits of exponent, one of mantissa, as bitsandbytes orders and scales them (12 is the largest)
_FP4_HALF = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4 = (*_FP4_HALF, *(-value for value in _FP4_HALF))
CODES = {"nf4": NF4, "fp4": FP4}


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` hold `count` values."""
    return -(count // -size)


def quantise_4bit(
    weight: torch.Tensor, kind: str, block_size: int, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed uint8 (ceil(n/2), 1), constants float32 (blocks,)) of a float weight of n values, any shape.

    kind: "nf4" or "fp4". The weight is moved to `device` chunk by chunk, so that it never lies there whole.
    """
    flat = weight.detach().reshape(-1)
    device = torch.device(device or flat.device)
    packed = pages.empty((blocks(flat.numel(), 2), 1), torch.uint8, device)
    absmax = torch.empty(blocks(flat.numel(), block_size), device=device)
    into = zip(packed.split(_CHUNK // 2), absmax.split(_CHUNK // block_size), strict=True)
    for chunk, (bytes_, constants) in zip(flat.split(_CHUNK), into, strict=True):
        found = torch.ops.bitsandbytes.quantize_4bit(chunk.to(device), block_size, kind, torch.uint8)
        bytes_.copy_(found[0])
        constants.copy_(found[1])
    return packed, absmax


def dequantise_4bit(
    packed: torch.Tensor, absmax: torch.Tensor, kind: str, block_size: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The dense weight of `shape` and `dtype`, a fresh tensor. Products are taken in float32 and rounded once."""
    count = math.prod(shape)
    if count % 2:  # bitsandbytes would compile a kernel for these
        return reference_dequantise_4bit(packed, absmax, kind, block_size, shape, dtype)
    if dtype == torch.bfloat16 and not count % block_size and _by_ours(packed):
        return torch.ops.ftrun.dequantise_4bit(packed, absmax, kind, block_size, shape)
    # its CPU kernel mixes constants up where a block crosses a row, so rows are made of whole blocks
    matrix = (1, count) if count % block_size else (count // block_size, block_size)
    return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, block_size, kind, matrix, dtype).view(shape)


def _by_ours(packed: torch.Tensor) -> bool:
    """On a CPU our kernel takes a third of bitsandbytes' time, for the same bytes."""
    return compiled.place(packed) == "cpu" and compiled.library() is not None


def _dequantise_4bit(
    packed: torch.Tensor, absmax: torch.Tensor, kind: str, block_size: int, shape: list[int]
) -> torch.Tensor:
    out = torch.empty(shape, dtype=torch.bfloat16)
    code = _code(kind)
    compiled.call("dequantise_4bit", True, out.numel(), packed, absmax, block_size, code, out)
    return out


@functools.cache
def _code(kind: str) -> torch.Tensor:
    return torch.tensor(CODES[kind])


def quantise_constants(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantisation: (uint8 (blocks,), float32 constants of blocks of 256, their mean as a float32 scalar)."""
    offset = absmax.mean()
    code = dynamic_map(absmax.device)
    quantised, nested = torch.ops.bitsandbytes.quantize_blockwise(absmax - offset, code, NESTED_BLOCK)
    return quantised, nested, offset


def dequantise_constants(quantised: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The constants again, float32 (blocks,). The dynamic map is looked up inside, so that no module stores it."""
    return torch.ops.ftrun.dequantise_constants(quantised, nested, offset)


def quantise_int8(weight: torch.Tensor, device: torch.device | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 of the weight's shape, float32 row magnitudes, the shape less its last size) of a float weight."""
    rows = weight.detach().reshape(-1, weight.shape[-1])
    device = torch.device(device or rows.device)
    quantised = pages.empty(tuple(rows.shape), torch.int8, device)
    absmax = torch.empty(rows.shape[0], device=device)
    size = max(1, _CHUNK // rows.shape[1])
    for part, values, constants in zip(rows.split(size), quantised.split(size), absmax.split(size), strict=True):
        _int8_rows(part.to(device), values, constants)
    return quantised.view(weight.shape), absmax.view(weight.shape[:-1])


def dequantise_int8(quantised: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight in `dtype`, a fresh tensor: value · magnitude / 127 in float32, rounded once."""
    return torch.ops.ftrun.dequantise_int8(quantised, absmax, dtype)


@functools.cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """bitsandbytes' 8-bit dynamic map, 256 float32 values in order (Dettmers et al. 2021, section 2.2)."""
    return bnb.create_dynamic_map().to(device)


def reference_quantise_4bit(weight: torch.Tensor, kind: str, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise_4bit` in plain torch: the nearest code point, ties to the lower one."""
    flat = weight.detach().reshape(-1).float()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    absmax = padded.abs().amax(1)
    scaled = (padded * (1 / absmax.clamp(min=1e-38))[:, None]).view(-1)[: flat.numel() + flat.numel() % 2]
    code, order = torch.tensor(CODES[kind], device=weight.device).sort()
    index = order[torch.bucketize(scaled, (code[1:] + code[:-1]) / 2)]
    index = index.to(torch.uint8)
    return (index[::2] << 4 | index[1::2]).unsqueeze(1), absmax


def reference_dequantise_4bit(
    packed: torch.Tensor, absmax: torch.Tensor, kind: str, block_size: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """`dequantise_4bit` in plain torch."""
    count = math.prod(shape)
    index = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)[:count].int()
    values = torch.tensor(CODES[kind], device=packed.device)[index]
    return (values * absmax.repeat_interleave(block_size)[:count]).to(dtype).view(shape)


def _int8_rows(rows: torch.Tensor, values: torch.Tensor, constants: torch.Tensor) -> None:
    constants.copy_(rows.abs().amax(1))
    # a row of zeros keeps the magnitude 0 and the values 0
    scale = INT8_MAX / constants.clamp(min=torch.finfo(torch.float32).tiny)
    values.copy_(torch.round(rows.float() * scale[:, None]))


def _dequantise_constants(quantised: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    code = dynamic_map(quantised.device)
    out = torch.ops.bitsandbytes.dequantize_blockwise(quantised, nested, code, NESTED_BLOCK, torch.float32)
    return out.add_(offset)


def _dequantise_int8(quantised: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scale = (absmax.reshape(-1, 1) / INT8_MAX).float()
    rows = quantised.reshape(-1, quantised.shape[-1])
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    # by chunks: a CPU makes float32 copies of all that it multiplies
    size = rows.shape[0] if rows.is_cuda else max(1, _CHUNK // rows.shape[1])
    for part, factor, into in zip(rows.split(size), scale.split(size), out.split(size), strict=True):
        torch.mul(part, factor, out=into)
    return out.view(quantised.shape)


def _register() -> None:
    define, implement, fake = torch.library.define, torch.library.impl, torch.library.register_fake
    define("ftrun::dequantise_constants", "(Tensor quantised, Tensor nested, Tensor offset) -> Tensor")
    implement("ftrun::dequantise_constants", "default", _dequantise_constants)
    fake("ftrun::dequantise_constants", lambda q, nested, offset: torch.empty_like(q, dtype=torch.float32))
    define("ftrun::dequantise_4bit", "(Tensor packed, Tensor absmax, str kind, int block, int[] shape) -> Tensor")
    implement("ftrun::dequantise_4bit", "default", _dequantise_4bit)
    fake("ftrun::dequantise_4bit", lambda packed, *how: packed.new_empty(how[-1], dtype=torch.bfloat16))
    define("ftrun::dequantise_int8", "(Tensor quantised, Tensor absmax, ScalarType dtype) -> Tensor")
    implement("ftrun::dequantise_int8", "default", _dequantise_int8)
    fake("ftrun::dequantise_int8", lambda q, absmax, dtype: torch.empty_like(q, dtype=dtype))


_register()
