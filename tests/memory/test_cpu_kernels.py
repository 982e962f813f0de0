"""Every rule of ftrun/memory/cpu_kernels.py against the allocator's events around the real kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ftrun.kernels import blockwise, compiled
from ftrun.memory import scratch
from ftrun.memory.cpu_kernels import transient
from ftrun.memory.events import allocations

aten = torch.ops.aten
T, W = 256, 512


def wide(dtype: torch.dtype = torch.float32, rows: int = T) -> torch.Tensor:
    return torch.randn(rows, W).to(dtype)


def held(func: Any, *args: Any, **kwargs: Any) -> int:
    """The bytes that the real kernel held for itself at its highest point."""
    func(*args, **kwargs)  # what is made once and kept
    with allocations() as seen:
        out = func(*args, **kwargs)
    del out
    return seen.peak - seen.end


def check(func: Any, *args: Any, slack: int = 64, **kwargs: Any) -> None:
    """slack: bytes of scalars that the kernel makes on the way."""
    planned = sum(transient(func, args, kwargs, func(*args, **kwargs)))
    assert planned == pytest.approx(held(func, *args, **kwargs), abs=slack)


bf16, f32 = torch.bfloat16, torch.float32
ELEMENTWISE: dict[str, Callable[[], tuple[Any, ...]]] = {
    "both one dtype": lambda: (aten.mul.Tensor, wide(), wide()),
    "16 and 32 bits": lambda: (aten.add.Tensor, wide(bf16), wide()),
    "32 and 16 bits": lambda: (aten.mul.Tensor, wide(), wide(bf16)),
    "a row of 16 bits": lambda: (aten.mul.Tensor, wide(), wide(bf16, 1)),
    "a mask": lambda: (aten.mul.Tensor, wide(bf16), wide() > 0),
    "in place": lambda: (aten.mul_.Tensor, wide(bf16), wide()),
    "three operands": lambda: (aten.addcmul.default, wide(), wide(bf16), wide(bf16)),
    "a number": lambda: (aten.mul.Tensor, wide(bf16), 2.0),
    "compared": lambda: (aten.lt.Tensor, wide(bf16), wide()),
    "chosen": lambda: (aten.where.self, wide() > 0, wide(bf16), wide()),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name: str) -> None:
    check(*ELEMENTWISE[name]())


REDUCTIONS: dict[str, tuple[Callable[[], tuple[Any, ...]], dict[str, Any]]] = {
    "plain": (lambda: (aten.sum.dim_IntList, wide(bf16), [0]), {}),
    "in float32": (lambda: (aten.sum.dim_IntList, wide(bf16), [0]), {"dtype": f32}),
    "of a mask": (lambda: (aten.sum.default, wide() > 0), {}),
    "cumulative": (lambda: (aten.cumsum.default, wide() > 0, -1), {}),
    "norm": (lambda: (aten.linalg_vector_norm.default, wide(bf16), 2, None, False), {"dtype": f32}),
    "mean": (lambda: (aten.mean.dim, wide(bf16), [-1], True), {}),
    "mean in float32": (lambda: (aten.mean.dim, wide(), [-1], True), {}),
    "logsumexp": (lambda: (aten.logsumexp.default, wide(), [-1]), {}),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str) -> None:
    make, kwargs = REDUCTIONS[name]
    check(*make(), slack=T * 4 + 64, **kwargs)  # logsumexp: which maxima are infinite


@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize(
    ("queries", "heads", "groups"), [(48, 4, 4), (64, 8, 2), (200, 4, 4), (512, 6, 3), (800, 4, 2)]
)
def test_attention(dtype: torch.dtype, queries: int, heads: int, groups: int) -> None:
    q, k, v = (torch.randn(2, queries, h, 64, dtype=dtype).transpose(1, 2) for h in (heads, groups, groups))
    check(aten._scaled_dot_product_flash_attention_for_cpu.default, q, k, v, 0.0, True)
    out, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    # the products of 16-bit tiles have scratchpads of oneDNN's
    slack = 64 if dtype == f32 else 300_000 * torch.get_num_threads()
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    check(backward, torch.randn_like(out), q, k, v, out, sums, 0.0, True, slack=slack)


@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("rows", [40, 1408])
def test_int8(dtype: torch.dtype, rows: int) -> None:
    values, absmax = blockwise.quantise_int8(torch.randn(rows, 704))
    check(torch.ops.ftrun.dequantise_int8.default, values, absmax, dtype)


@pytest.mark.parametrize("choice", ["adamw_8bit", "lion"])
@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("count", [2048, 1 << 16])
def test_optimisers_of_bitsandbytes(choice: str, dtype: torch.dtype, count: int) -> None:
    from bitsandbytes.optim import AdamW8bit, Lion8bit

    parameter = torch.nn.Parameter(torch.randn(count, dtype=dtype))
    optimiser = (AdamW8bit if choice == "adamw_8bit" else Lion8bit)([parameter])
    calls: list[tuple[Any, ...]] = []

    class Catch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "optimizer_update" in str(func):
                calls.append((func, *args))
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        parameter.grad = torch.randn_like(parameter)
        with Catch():
            optimiser.step()
    func, *args = calls[-1]
    assert sum(transient(func, args, {}, None)) == pytest.approx(held(func, *args), rel=0.01)


@pytest.mark.skipif(not compiled.tiles_at_hand(), reason="this processor has no AMX tiles")
@pytest.mark.parametrize("lengths", [[T], [100, 60, 90, 6]])
@pytest.mark.parametrize("heads", [2, 4])
def test_attention_on_tiles(lengths: list[int], heads: int) -> None:
    q, k, v = (torch.randn(1, T, n, 64).bfloat16().transpose(1, 2) for n in (4, heads, heads))
    out, lse = torch.ops.ftrun.attention(q, k, v, lengths, 0.125, T)
    check(torch.ops.ftrun.attention.default, q, k, v, lengths, 0.125, T)
    check(torch.ops.ftrun.attention_backward.default, out, q, k, v, out, lse, lengths, 0.125, T)


@pytest.mark.skipif(not compiled.tiles_at_hand(), reason="this processor has no AMX tiles")
def test_products_on_tiles() -> None:
    x, small = wide(bf16), torch.randn(T, 32).bfloat16()
    check(
        torch.ops.ftrun.linear.default, [x, small], [wide(bf16, 96), torch.randn(96, 32).bfloat16()], True, None, None
    )
    check(torch.ops.ftrun.linear.default, [x], [torch.randn(W, 40).bfloat16()], False, None, None)
    check(torch.ops.ftrun.cross.default, wide(bf16), torch.randn(5, W))


@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(64, 512, 512), (512, 8192, 256), (300, 64, 1000), (16, 700, 64)]
)
def test_products_of_onednn_are_measured_once(rows: int, depth: int, columns: int) -> None:
    left, right = torch.randn(rows, depth).bfloat16(), torch.randn(columns, depth).bfloat16()
    check(aten.mm.default, left, right.T)
    before = scratch._of.cache_info().misses
    check(aten.mm.default, left, right.T)
    assert scratch._of.cache_info().misses == before
