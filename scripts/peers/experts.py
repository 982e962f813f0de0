"""Mixtral's experts as transformers had them up to 4.57: linear layers in a loop, each on the tokens routed to it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Expert(nn.Module):
    """MixtralBlockSparseTop2MLP."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden, bias=False)
        self.w3 = nn.Linear(hidden, inner, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Experts(nn.Module):
    """MixtralSparseMoeBlock, with as many tokens for each expert: fake tensors have no router's choice."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(
            Expert(config.hidden_size, config.intermediate_size) for _ in range(config.num_local_experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape, count = x.shape, len(self.experts)
        x = x.view(-1, shape[-1])
        weights = F.softmax(self.gate(x), dim=1, dtype=torch.float)
        weights, chosen = torch.topk(weights, self.top, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        total = torch.zeros_like(x)
        masks = chosen.new_zeros(*chosen.shape, count)  # one_hot
        for number, expert in enumerate(self.experts):
            share = len(x) * self.top // count + (number < len(x) * self.top % count)
            rank, rows = chosen.new_zeros(share), chosen.new_zeros(share)
            part = expert(x[None, rows].reshape(-1, shape[-1])) * weights[rows, rank, None]
            total.index_add_(0, rows, part.to(x.dtype))
        del masks
        return total.view(shape)


def replace(model: nn.Module, dtype: torch.dtype) -> None:
    """Each decoder layer's block of experts; on the meta device."""
    for layer in model.model.layers:  # type: ignore[union-attr]
        with torch.device("meta"):
            layer.mlp = Experts(model.config).to(dtype)  # type: ignore[union-attr]
