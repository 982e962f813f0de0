"""What oneDNN's bfloat16 products work in, measured once a shape on this machine and remembered in the cache.

Its choice of blocks follows from the processor, its caches and the threads, by rules that change with each version; so
a plan asks the product itself. Operands are pages that nobody has written, and nothing of a model's size is made.
"""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ftrun.beside import replace_text
from ftrun.kernels import compiled
from ftrun.memory.events import allocations
from ftrun.runs import cache_dir

# what is too large to measure takes the usual room: bytes of the factors (never written) and of the result, operations
_FACTORS, _RESULT, _WORK = 1 << 32, 1 << 28, 10**12
_USUAL = 1_200_000  # bytes beside the sums: what products that sum over much were seen to pack


def of_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> int:
    """Bytes of the room of left (m, k) times right (k, n), bfloat16, as they lie; fake tensors or others."""
    (rows, depth), columns = left.shape, right.shape[1]
    sizes = 2 * (rows * depth + depth * columns), 2 * rows * columns, rows * depth * columns
    if any(size > most for size, most in zip(sizes, (_FACTORS, _RESULT, _WORK), strict=True)):
        return 4 * rows * columns + _USUAL
    return _of(rows, depth, columns, *_lying(left), *_lying(right), *_lying(out), torch.get_num_threads())


def _lying(matrix: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(step) for step in matrix.stride())


@functools.cache
def _of(*shape: int) -> int:
    known, key = _known(), " ".join(map(str, shape))
    if key not in known:
        known[key] = _measured(*shape)
        _remember(known)
    return known[key]


def _measured(rows: int, depth: int, columns: int, *lying: int) -> int:
    with _disable_current_modes(), torch.no_grad():
        left = torch.empty_strided((rows, depth), lying[0:2], dtype=torch.bfloat16)
        right = torch.empty_strided((depth, columns), lying[2:4], dtype=torch.bfloat16)
        out = torch.empty_strided((rows, columns), lying[4:6], dtype=torch.bfloat16)
        torch.mm(left, right, out=out)  # the first of a shape also compiles
        with allocations() as seen:
            torch.mm(left, right, out=out)
    return seen.peak


@functools.cache
def _known() -> dict[str, int]:
    """What was measured before on such a processor, by such a torch."""
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
        return {str(key): int(size) for key, size in found.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}


def _remember(known: dict[str, int]) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written: measured again next time
        replace_text(_path(), json.dumps(known))


def _path() -> Path:
    return cache_dir() / "kernels" / f"products-{compiled.machine()}.json"
