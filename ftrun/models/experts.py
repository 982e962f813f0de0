"""Experts in transformers' models by our grouped product, in every dtype, on real and on fake tensors.

transformers' own grouped product has fake tensors in bfloat16 only, and its batched one copies a whole matrix for each
token and expert: 4 GB a layer for 1,000 tokens through two experts of 512 × 1,024 in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ftrun.kernels.experts import grouped_product, routed, why_not

GROUPED = "ftrun_grouped"  # the name under which transformers finds our experts


def register_experts() -> None:
    """Make GROUPED an implementation of experts for transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(GROUPED, _forward)


def _forward(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """hidden (tokens, width) -> (tokens, width); layouts that `routed` does not know stay transformers' own."""
    if why_not(module):
        return _theirs(module)(module, hidden, top_k_index, top_k_weights, **kwargs)
    up, down = (_product(module, name) for name in ("gate_up_proj", "down_proj"))
    return routed(hidden, top_k_index, top_k_weights, module.num_experts, up, module._apply_gate, down)


def _product(module: nn.Module, name: str) -> Any:
    return lambda x, offsets: grouped_product(x, module.get_parameter(name), offsets)


def _theirs(module: nn.Module) -> Any:
    """Their grouped product in bfloat16, which has fake tensors; the batched one otherwise."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    low = next(module.parameters()).dtype == torch.bfloat16
    return ALL_EXPERTS_FUNCTIONS["grouped_mm" if low else "batched_mm"]
