"""LoRA (Hu et al. 2021): W' = W + s B A beside every selected weight, s = alpha / rank, or alpha / √rank (rsLoRA).

A (rank, in) is drawn, B (out, rank) starts at zero, so the first step sees the base itself. Files are PEFT's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from ftrun.errors import UserError
from ftrun.kernels import lora as product
from ftrun.kernels.dense import dense_weight, features, is_conv1d
from ftrun.methods import base
from ftrun.methods.files import peft_targets
from ftrun.methods.kept import embed_scale, keep
from ftrun.methods.options import LowRankOptions
from ftrun.methods.patterns import resolve
from ftrun.values import Anatomy, Site


@dataclass(frozen=True)
class Options(LowRankOptions):
    """LoRA's: those of every low-rank update."""


L = TypeVar("L", bound=LowRankOptions)


@dataclass(frozen=True)
class Update:
    """What one site's update is built with."""

    rank: int
    alpha: float
    scale: float
    dropout: float
    init: str
    dtype: torch.dtype
    kernels: str


class LoRALinear(base.Wrapper):
    """A frozen linear layer of any storage, and B A beside it. x (…, in) -> (…, out) in the dtype of x."""

    def __init__(self, name: str, layer: nn.Module, update: Update) -> None:
        super().__init__(name, layer)
        self.update, self.scale = update, update.scale
        wide, tall = features(layer)
        self.lora_A = base.parameter((update.rank, wide), layer, update.dtype)
        self.lora_B = base.parameter((tall, update.rank), layer, update.dtype)

    def own(self) -> dict[str, tuple[str, nn.Parameter]]:
        return {"lora_A.weight": ("A", self.lora_A), "lora_B.weight": ("B", self.lora_B)}

    def reset(self, seed: int) -> None:
        draw_a(self.lora_A, self.update, self.generator(seed))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return self.base(x)  # type: ignore[no-any-return]
        dropout = self.update.dropout if self.training else 0.0
        if self.update.kernels == "reference":
            return product.reference(x, self.base, self.lora_A, self.lora_B, self.scale, dropout)
        layer, dtype = self.base, x.dtype
        return product.fast(
            x, lambda: dense_weight(layer, dtype), self.bias, self.lora_A, self.lora_B, self.scale, dropout
        )

    def merged_weight(self) -> torch.Tensor:
        with torch.no_grad():
            return dense_weight(self.base, torch.float32) + self.scale * (self.lora_B.float() @ self.lora_A.float())


class LoRAEmbedding(base.Wrapper):
    """A frozen embedding (tokens, width) and the update s (B A)ᵀ: B is drawn and A (rank, tokens) starts at zero."""

    def __init__(self, name: str, layer: nn.Embedding, update: Update) -> None:
        super().__init__(name, layer)
        self.update, self.scale = update, update.scale
        tokens, width = layer.weight.shape
        self.lora_A = base.parameter((update.rank, tokens), layer, update.dtype)
        self.lora_B = base.parameter((width, update.rank), layer, update.dtype)

    def own(self) -> dict[str, tuple[str, nn.Parameter]]:
        return {"lora_embedding_A": ("A", self.lora_A), "lora_embedding_B": ("B", self.lora_B)}

    def reset(self, seed: int) -> None:
        nn.init.zeros_(self.lora_A)
        with torch.no_grad():
            self.lora_B.copy_(torch.randn(self.lora_B.shape, generator=self.generator(seed)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(ids)
        if not self.enabled:
            return out
        narrow = F.embedding(ids, self.lora_A.T, self.base.padding_idx)
        update = self.scale * (narrow.to(out.dtype) @ self.lora_B.T.to(out.dtype))
        factor = embed_scale(self.base)
        return out + (update if factor is None else update * factor.to(out.dtype))

    def merged_weight(self) -> torch.Tensor:
        with torch.no_grad():
            return self.weight.float() + self.scale * (self.lora_B.float() @ self.lora_A.float()).T


class LowRank(base.Tuner[L]):
    """The walk that LoRA and DoRA share: which sites, which ranks, what the file's config says."""

    def __init__(self, options: L) -> None:
        super().__init__(options)
        self._updates: dict[str, Update] = {}
        self._modules: tuple[str, ...] = ()
        self._conv1d = False

    def wrap(self, model: nn.Module, anatomy: Anatomy, kernels: str) -> list[base.Wrapper]:
        self._modules = tuple(name for name, _ in model.named_modules())
        self._updates = self.plan(anatomy, kernels)
        made: list[base.Wrapper] = []
        for site in anatomy.sites:
            made.append(self.layer(model, site, self._updates[site.name]))
        self._conv1d = any(is_conv1d(wrapper.base) for wrapper in made)
        kept = keep(model, anatomy, self.options.modules_to_save, getattr(torch, self.options.dtype))
        return [*made, *kept]

    def layer(self, model: nn.Module, site: Site, update: Update) -> base.Wrapper:
        """The wrapper of one site."""
        raise NotImplementedError

    def plan(self, anatomy: Anatomy, kernels: str) -> dict[str, Update]:
        """Each selected weight's rank, alpha and scale, by name."""
        o = self.options
        ranks = resolve(o.rank_pattern, "rank_pattern", anatomy.sites, anatomy.depth, o.rank)
        alphas = resolve(o.alpha_pattern, "alpha_pattern", anatomy.sites, anatomy.depth, o.alpha)
        made = {}
        for name, rank in ranks.items():
            scale = alphas[name] / (math.sqrt(rank) if o.rslora else rank)
            made[name] = Update(rank, alphas[name], scale, o.dropout, o.init, getattr(torch, o.dtype), kernels)
        return made

    def adapter_config(self, anatomy: Anatomy, base_name: str) -> dict[str, Any]:
        o, plan = self.options, self._updates
        kept = [wrapper for wrapper, chosen in _kept_names(anatomy, o.modules_to_save).items() if chosen]
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "r": o.rank,
            "lora_alpha": o.alpha,
            "lora_dropout": o.dropout,
            "use_rslora": o.rslora,
            "use_dora": self.kind == "dora",
            "bias": "none",
            "fan_in_fan_out": self._conv1d,
            "inference_mode": True,
            "init_lora_weights": "gaussian" if o.init == "gaussian" else True,
            "target_modules": peft_targets(plan, self._modules),
            "rank_pattern": {name: u.rank for name, u in plan.items() if u.rank != o.rank},
            "alpha_pattern": {name: u.alpha for name, u in plan.items() if u.alpha != o.alpha},
            "modules_to_save": kept or None,
        }
        if kept and anatomy.tied:
            config["ensure_weight_tying"] = True
        return config


class Tuner(LowRank[Options]):
    """LoRA on linear layers, embeddings and experts."""

    def layer(self, model: nn.Module, site: Site, update: Update) -> base.Wrapper:
        if site.role.startswith("experts"):
            raise UserError(
                f"method=lora: {site.name} holds experts as one parameter; LoRA on experts is not available"
            )
        module = model.get_submodule(site.name)
        if isinstance(module, nn.Embedding):
            return LoRAEmbedding(site.name, module, update)
        return LoRALinear(site.name, module, update)


def _kept_names(anatomy: Anatomy, roles: list[str]) -> dict[str, bool]:
    everything = anatomy.tied and bool(roles)
    return {
        anatomy.embeddings: everything or "embeddings" in roles,
        anatomy.head: everything or "head" in roles,
    }


def draw_a(a: nn.Parameter, update: Update, generator: torch.Generator) -> None:
    """A's first values as PEFT draws them: uniform in ±1/√in (Kaiming with a = √5), or normal with deviation 1/rank."""
    with torch.no_grad():
        if update.init == "gaussian":
            a.copy_(torch.randn(a.shape, generator=generator) / update.rank)
        else:
            a.copy_((torch.rand(a.shape, generator=generator) * 2 - 1) / math.sqrt(a.shape[1]))
