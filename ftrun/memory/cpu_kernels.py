"""What kernels of the CPU allocate and free within one operation: nobody sees it from outside, the peak does.

A fake tensor's operation makes its outputs and nothing else. Each rule here gives the sizes, in bytes, of the blocks
that torch's or bitsandbytes' CPU kernel holds at its own highest point beyond inputs and outputs; the source is named
with the rule, and tests/memory/test_cpu_kernels.py compares every rule with the allocator's events.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ftrun.kernels import attention, dora, linear
from ftrun.memory import scratch

Sizes = Iterable[int]
_INT8_CHUNK = 1 << 19  # elements that ftrun::dequantise_int8 makes dense at once (ftrun/kernels/blockwise.py)


def transient(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """The sizes in bytes of what `func`'s CPU kernel holds for itself, all at once, while it runs."""
    schema = getattr(func, "_schema", None)  # higher-order operators have none
    rule = None if schema is None else _RULES.get(schema.name.removesuffix("_"))
    return () if rule is None else rule(args, kwargs, out)


def _casts(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """Operands of an elementwise operation that have not the common dtype are copied to it first.

    TensorIteratorBase::compute_types (aten/src/ATen/TensorIterator.cpp): promote_inputs_to_common_dtype and, in
    place, cast_common_dtype_to_outputs. GPUs cast within their kernels instead.
    """
    operands = [t for t in args if isinstance(t, torch.Tensor) and t.dim()]
    if len({t.dtype for t in operands}) < 2:
        return
    common = functools.reduce(torch.promote_types, (t.dtype for t in operands))
    yield from (t.numel() * common.itemsize for t in operands if t.dtype != common)
    if out is args[0] and out.dtype != common:
        yield out.numel() * common.itemsize


def _where(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """As elementwise operations, but that the condition stays bool (where, aten/src/ATen/native/TensorCompare.cpp)."""
    return _casts(args[1:], kwargs, out)


def _reduction(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """An input of another dtype than the sum's is copied (make_reduction, aten/src/ATen/native/ReduceOpsUtils.h)."""
    if args[0].dtype != out.dtype:
        yield args[0].numel() * out.dtype.itemsize


def _mean(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """Means of 16-bit floats are sums in float32 (mean_kernel_impl, aten/src/ATen/native/ReduceOps.cpp)."""
    if args[0].dtype.itemsize == 2:
        yield from (args[0].numel() * 4, out.numel() * 4)


def _logsumexp(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """The maxima and exp(x - maximum) (logsumexp_out_impl, aten/src/ATen/native/ReduceOps.cpp)."""
    return args[0].nbytes, out.nbytes


def _attention(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """cpu_flash_attention (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp): a tile of scores, its row statistics
    and outputs a thread; 16-bit floats also the tile rounded and, on AMX tiles from 64 keys on, keys and values packed
    for oneDNN (could_pack, packb_size)."""
    query, key = args[0], args[1]
    width, threads = query.shape[-1], torch.get_num_threads()
    rows, columns = _tile(query.shape[-2], key.shape[-2])
    yield threads * (rows * columns + 2 * rows + rows * width) * 4
    if query.dtype.itemsize == 2:
        yield threads * rows * columns * 2
        if key.shape[-2] >= 64 and _packs(query.dtype):
            yield from (key.numel() * 2, key.numel() * 2, threads * columns * width * 2)


def _packs(dtype: torch.dtype) -> bool:
    """Whether products of a 16-bit dtype run on the processor's tiles, which want their right factor packed."""
    return torch.cpu._is_amx_fp16_supported() if dtype == torch.float16 else torch.cpu._is_amx_tile_supported()


def _attention_backward(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """cpu_flash_attention_backward: the rows' sums once; a tile of scores and one of their gradients a thread."""
    query, key = args[1], args[2]
    threads = torch.get_num_threads()
    rows, columns = _tile(query.shape[-2], key.shape[-2])
    yield rows * 4
    yield 2 * threads * rows * columns * 4
    if query.dtype.itemsize == 2:
        yield 2 * threads * rows * columns * 2


def _attended(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """ftrun/kernels/attention.py: where rows begin, and what the threads work in."""
    lengths = args[3]
    return 8 * (len(lengths) + 1), attention.scratch_bytes(lengths, args[0].shape[-1], back=False)


def _attended_backward(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """As `_attended`, and each query head's own gradients of keys and values where heads share them."""
    lengths, query, key = args[6], args[1], args[2]
    yield from (8 * (len(lengths) + 1), attention.scratch_bytes(lengths, query.shape[-1], back=True))
    yield attention.shares_bytes(query, key)


def _linear(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """ftrun/kernels/linear.py: the weights in panels, and what the threads work in."""
    inputs = args[0]
    yield from (x.nbytes for x in inputs if x.stride(1) != 1)
    yield linear.scratch_bytes(out.shape[0], out.shape[1], sum(x.shape[1] for x in inputs))


def _cross(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """ftrun/kernels/dora.py: what W Aᵀ works in."""
    return (dora.scratch_bytes(args[0].shape[1], args[1].shape[0]),)


def _product(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """What oneDNN packs and sums in for a bfloat16 product (brgemm matmul): its rules are many, so it is measured."""
    left, right = args[0], args[1]
    if left.dtype == torch.bfloat16:
        yield scratch.of_product(left, right, out)


def _tile(queries: int, keys: int) -> tuple[int, int]:
    """flash_attention_kernel_impl: 256 × 512 scores from 768 queries on, 64 × 512 from 192 on, else 32 × 512."""
    rows = 256 if queries >= 768 else 64 if queries >= 192 else 32
    return min(rows, queries), min(512, keys)


def _update_8bit(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """bitsandbytes/backends/cpu/ops.py, _optimizer_update_8bit_blockwise_cpu: moments and gradient in float32, then
    two more of that size (adam: root and quotient of the second moment; lion: three, with one moment)."""
    parameter = args[2]
    return [4 * parameter.numel()] * (5 + (parameter.dtype != torch.float32))


def _update_32bit(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """bitsandbytes/backends/cpu/ops.py, _optimizer_update_32bit_cpu: the scaled gradient and two for the update."""
    parameter = args[2]
    return [4 * parameter.numel()] * (3 + (parameter.dtype != torch.float32))


def _dequantise_int8(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """ftrun/kernels/blockwise.py: the rows' scales; a chunk of values cast to float32, and its product unless the
    output is float32 itself."""
    values, absmax = args[0], args[1]
    rows = min(absmax.numel(), max(1, _INT8_CHUNK // values.shape[-1]))
    yield absmax.numel() * 4
    yield from [rows * values.shape[-1] * 4] * (1 + (out.dtype != torch.float32))


_ELEMENTWISE = ("add", "sub", "rsub", "mul", "div", "addcmul", "addcdiv", "maximum", "minimum", "lerp")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def _gathered(args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Sizes:
    """Gloo gathers into a flat tensor of its own and copies it out (AsyncAllgatherWork: newLikeFlat,
    torch/csrc/distributed/c10d/ProcessGroupGloo.cpp)."""
    yield args[0].nbytes


_RULES: dict[str, Callable[[Sequence[Any], dict[str, Any], Any], Sizes]] = {
    **{f"aten::{name}": _casts for name in (*_ELEMENTWISE, *_COMPARISONS)},
    **{f"aten::{name}": _reduction for name in ("sum", "cumsum", "linalg_vector_norm")},
    "aten::where": _where,
    "aten::mean": _mean,
    "aten::logsumexp": _logsumexp,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "bitsandbytes::optimizer_update_8bit_blockwise": _update_8bit,
    "bitsandbytes::optimizer_update_32bit": _update_32bit,
    "ftrun::dequantise_int8": _dequantise_int8,
    "aten::mm": _product,
    "ftrun::linear": _linear,
    "ftrun::cross": _cross,
    "ftrun::attention": _attended,
    "ftrun::attention_backward": _attended_backward,
    "c10d::_allgather_base": _gathered,
}
