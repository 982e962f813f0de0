"""What differs when a step traced on fake CPU tensors runs on CUDA: other operators, and memory used inside kernels.

`CudaOps` has the step take the operators that CUDA takes; `transient` says what each of them allocates within itself;
`workspaces` and `context` are what a process holds beside its tensors. Sources: PyTorch 2.4 to 2.13, file by file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ftrun.kernels import loss  # noqa: F401 (registers ftrun::cross_entropy_)

MIB = 1 << 20
aten = torch.ops.aten


def workspaces(capability: tuple[int, int], biased: bool = False) -> list[int]:
    """Bytes that cuBLAS takes from the allocator for each thread that multiplies; forward and backward are two.

    CUDABlas.cpp and CublasHandlePool.cpp (torch 2.4 to 2.10): getChosenWorkspaceSize is 2 × 4096 KiB + 8 × 16 KiB, on
    Hopper and later 4096 × 8 KiB; cuBLASLt, which adds a bias while it multiplies (`biased`), takes 1024 KiB more.
    """
    plain = 32 * MIB if capability[0] >= 9 else 2 * 4096 * 1024 + 8 * 16 * 1024
    return [plain, MIB] if biased else [plain]


def context(capability: tuple[int, int]) -> int:
    """Bytes of the CUDA context with PyTorch's kernels loaded: outside the allocator, inside nvidia-smi's figure.

    T4 with torch 2.10: 140.9 MiB (fitcheck's measurements); A100 with torch 2.4: 521 and 555 MiB (fms-acceleration's
    nvidia-smi less what was reserved). Other cards are taken as an A100.
    """
    return 141 * MIB if capability < (8, 0) else 530 * MIB


class CudaOps(TorchFunctionMode):
    """While active, functions whose CPU implementation holds other tensors than CUDA's take CUDA's operators.

    Only for fake tensors: those operators have no CPU kernel.
    """

    def __init__(self, capability: tuple[int, int] = (8, 0)) -> None:
        super().__init__()
        self.capability = capability

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            return self._backward(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return attention(self.capability, *args, **kwargs)
        if torch.is_autocast_enabled("cpu") and func in _FLOAT_UNDER_AUTOCAST:
            args = tuple(_float(a) for a in args)
        stand_in = _STAND_INS.get(func)
        return func(*args, **kwargs) if stand_in is None else stand_in(func, *args, **kwargs)

    def _backward(self, tensor: torch.Tensor, gradient: Any = None, retain_graph: bool = False, **kwargs: Any) -> None:
        """Tensor.backward with the mode on: it is off within its own handler, and what is computed again needs it."""
        gradients = (torch.ones_like(tensor) if gradient is None else gradient,)
        run = torch.autograd.graph._engine_run_backward
        with self:
            run((tensor,), gradients, bool(retain_graph), False, (), allow_unreachable=True, accumulate_grad=True)


def _float(value: Any) -> Any:
    half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _softmax(func: Any, input: Any, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """A half input asked for in float32 is read as it is: no float32 copy (SoftMax.cu, half_to_float)."""
    dtype = kwargs.get("dtype", next((a for a in args if isinstance(a, torch.dtype)), None))
    if dtype is torch.float32 and input.dtype in (torch.float16, torch.bfloat16) and dim is not None:
        op = aten._log_softmax if func in _LOG_SOFTMAX else aten._softmax
        return op(input, dim, True)
    return func(input, dim, *args, **kwargs)


def _dropout(func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """The mask is bool and the product fused (Dropout.cpp, is_fused_kernel_acceptable)."""
    if not training or not 0 < p < 1 or inplace:
        return func(input, p, training, inplace) if func is F.dropout else func(input, p, training)
    return aten.native_dropout(input, p, True)[0]


_LOG_SOFTMAX = (F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax)
_STAND_INS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.softmax, torch.softmax, torch.Tensor.softmax, *_LOG_SOFTMAX), _softmax),
    **dict.fromkeys((F.dropout, torch.dropout), _dropout),
}
# autocast_mode.h, AT_FORALL_FP32: what CUDA computes in float32 and the CPU leaves as it is
_FLOAT_UNDER_AUTOCAST = {
    *(F.softmax, torch.softmax, torch.Tensor.softmax, *_LOG_SOFTMAX, F.layer_norm, F.group_norm),
    *(F.cross_entropy, F.nll_loss, torch.pow, torch.Tensor.pow, torch.rsqrt, torch.Tensor.rsqrt, torch.exp),
    *(torch.Tensor.exp, torch.log, torch.Tensor.log, torch.sum, torch.Tensor.sum, torch.cumsum, torch.Tensor.cumsum),
    *(torch.norm, torch.Tensor.norm, torch.prod, torch.Tensor.prod),
}


def attention(
    capability: tuple[int, int],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """scaled_dot_product_attention by the kernel that CUDA would choose: flash, else memory-efficient, else plain.

    The choice: sdp_utils.cpp, the default order without cuDNN. (B, H, T, D), grouped heads only with `enable_gqa`.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and capability >= (8, 0) and attn_mask is None and query.shape[-1] <= 256:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    grouped = query.shape[-3] != key.shape[-3]
    if not grouped and (query.dtype is not torch.bfloat16 or capability >= (8, 0)):
        lse = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, lse, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def transient(func: Any, args: Any, kwargs: Any, out: Any) -> Iterable[int]:
    """Sizes in bytes of the blocks that CUDA's kernel of this operator allocates and frees before it returns."""
    rule = _RULES.get(getattr(func, "overloadpacket", func))
    return () if rule is None else rule(args, out)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _softmax_backward(args: Any, out: Any) -> list[int]:
    """SoftMax.cu, softmax_backward_cuda_out: `Tensor tmp = grad * output`."""
    return [_size(args[0])]


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def flash_backward(query: tuple[int, ...], kv_heads: int, keys: int, itemsize: int) -> list[int]:
    """Bytes of flash attention's backward pass beside its gradients; query: (B, H, T, D).

    flash_api.cpp, mha_bwd: softmax_d, dq_accum in float32, and dk, dv for every query head under grouped heads.
    """
    batch, heads, tokens, width = query
    rounded = _up(tokens, 128)
    padded = _up(width, 32) if width <= 128 else _up(width, 64)
    sizes = [4 * batch * heads * rounded, 4 * batch * rounded * heads * padded]
    if kv_heads != heads:
        sizes += [itemsize * batch * keys * heads * _up(width, 8)] * 2
    return sizes


def _flash_backward(args: Any, out: Any) -> list[int]:
    query, key = args[1], args[2]
    return flash_backward(tuple(query.shape), key.shape[1], key.shape[2], query.element_size())


def _efficient_backward(args: Any, out: Any) -> list[int]:
    """attention_backward.cu and kernel_backward.h of mem_eff_attention: delta, and what gradients gather in."""
    query, key, value = args[1], args[2], args[3]
    batch, heads, tokens, width = query.shape
    half = query.element_size() == 2
    block = 128 if half and width > 64 else 64  # queries a tile: the 128 × 64 kernels, which the table lists first
    elements = _up(tokens, block) * _up(width, 64)  # dQ is gathered in float32: keys are split (kEnableSplitKeys)
    if half and width > 128:  # dK and dV do not stay in registers (kOutputInRF)
        splits = max(1, min(-(-key.shape[2] // 64), 200 // (batch * heads)))
        elements += splits * _up(key.shape[2], 64) * (_up(width, block) + _up(value.shape[-1], block))
    delta = 4 * batch * heads * tokens
    # the float32 kernel has delta computed before it: grad_out * out, its sum, and that transposed
    before = [] if half else [_size(query), delta]
    return [delta, 4 * batch * heads * elements, *before]


def _cross_entropy(args: Any, out: Any) -> list[int]:
    """ftrun/kernels/loss.py: the chunk of logits in float32, which compiled code may do without."""
    return [4 * args[0].numel()]


_RULES: dict[Any, Callable[[Any, Any], list[int]]] = {
    torch.ops.ftrun.cross_entropy_: _cross_entropy,
    aten._softmax_backward_data: _softmax_backward,
    aten._scaled_dot_product_flash_attention_backward: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward: _efficient_backward,
}
