"""Host tensors in pages of their own, which go back to the system when they are freed.

The C library keeps freed blocks and cuts the next small ones out of them, so that a long run of "read a large
tensor, keep a small one" ends up holding every large one.
"""

from __future__ import annotations

import math
import mmap

import torch

_SMALL = 1 << 16  # bytes; below, pages would be wasted


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """An unfilled tensor; on the CPU, where it is large, in private pages of its own."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < _SMALL:
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
