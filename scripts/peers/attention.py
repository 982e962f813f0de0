"""The attention of the peers' runs, registered with transformers by name; (B, H, T, D) in, (B, T, H, D) out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from ftrun.memory.cuda import attention

# "flash" within a name has transformers look for the package
FLASH, FLASH_REPEATED, EFFICIENT, MASKED = "peer_fused", "peer_fused_repeated", "peer_efficient", "peer_masked"


def register() -> None:
    """FLASH: flash_attention_2; FLASH_REPEATED: the same after repeat_kv; EFFICIENT: memory-efficient, after it;
    MASKED: that with a mask."""
    named = {FLASH: _flash, FLASH_REPEATED: _flash_repeated, EFFICIENT: _efficient, MASKED: _masked}
    for name, function in named.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


def _masked(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, scaling: Any = None, **kwargs: Any) -> Any:
    """sdpa_attention.py where rows are padded: heads repeated, each layer's own additive copy of the mask."""
    k, v = repeat_kv(k, q.shape[1] // k.shape[1]), repeat_kv(v, q.shape[1] // v.shape[1])
    tokens = q.shape[2]
    bias = q.new_zeros(q.shape[0], 1, tokens, -(-tokens // 16) * 16)[..., :tokens].expand(-1, q.shape[1], -1, -1)
    out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, False, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None


def _flash(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, scaling: Any = None, **kwargs: Any) -> Any:
    """modeling_flash_attention_utils.py: float32 (a layer upcast in training) goes to half first."""
    if q.dtype is torch.float32:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.bfloat16
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = attention((8, 0), q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def _flash_repeated(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, scaling: Any = None, **kwargs: Any) -> Any:
    k, v = repeat_kv(k, q.shape[1] // k.shape[1]), repeat_kv(v, q.shape[1] // v.shape[1])
    return _flash(module, q, k, v, mask, scaling)


def repeat_kv(x: torch.Tensor, groups: int) -> torch.Tensor:
    """transformers' repeat_kv."""
    if groups == 1:
        return x
    b, kv, t, d = x.shape
    return x[:, :, None].expand(b, kv, groups, t, d).reshape(b, kv * groups, t, d)


def _efficient(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, scaling: Any = None, **kwargs: Any) -> Any:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    # the backend was pinned to EFFICIENT_ATTENTION (fitcheck's scripts/measure.py)
    out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None
