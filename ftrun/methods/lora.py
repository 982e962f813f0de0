"""LoRA (Hu et al. 2021): W' = W + s B A beside every selected weight, s = alpha / rank, or alpha / √rank (rsLoRA).

A (rank, in) is drawn, B (out, rank) starts at zero, so the first step sees the base itself. Files are PEFT's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from ftrun.errors import UserError
from ftrun.kernels import lora as product
from ftrun.kernels.dense import dense_weight, features, is_conv1d
from ftrun.kernels.experts import ExpertsLinear, GroupedExperts, group_experts, grouped_product, why_not
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

    def own(self) -> dict[str, base.Trained]:
        return {"lora_A.weight": base.Trained("A", self.lora_A), "lora_B.weight": base.Trained("B", self.lora_B)}

    def reset(self, seed: int) -> None:
        draw_a(self.lora_A, self.update, self.generator(seed))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return self.base(x)
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

    def own(self) -> dict[str, base.Trained]:
        return {"lora_embedding_A": base.Trained("A", self.lora_A), "lora_embedding_B": base.Trained("B", self.lora_B)}

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


class LoRAExperts(base.Wrapper):
    """Experts (experts, out, in) with an update each: x (tokens, in) sorted by expert, offsets -> (tokens, out).

    A (experts, rank, in) and B (experts, out, rank) stand side by side in the file, as PEFT has them: (rank · experts,
    in) and (out, rank · experts), there with the experts running fastest.
    """

    def __init__(self, name: str, layer: nn.Module, update: Update) -> None:
        super().__init__(name, layer)
        self.update, self.scale = update, update.scale
        count, self.in_features, self.out_features = self.base.experts, self.base.in_features, self.base.out_features
        self.lora_A = base.parameter((count, update.rank, self.in_features), layer, update.dtype)
        self.lora_B = base.parameter((count, self.out_features, update.rank), layer, update.dtype)

    def own(self) -> dict[str, base.Trained]:
        count, rank = self.lora_A.shape[:2]
        return {
            "lora_A.weight": base.Trained(
                "A", self.lora_A, lambda a: a.flatten(0, 1), lambda a: a.unflatten(0, (count, rank))
            ),
            "lora_B.weight": base.Trained(
                "B",
                self.lora_B,
                lambda b: b.permute(1, 2, 0).flatten(1),
                lambda b: b.unflatten(1, (rank, count)).permute(2, 0, 1),
            ),
        }

    def reset(self, seed: int) -> None:
        draw_a(self.lora_A, self.update, self.generator(seed))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x, offsets)
        if not self.enabled:
            return out
        # a grouped product needs rows of 16 bytes: the rank is filled up with zeros
        fill = -self.update.rank % 8
        a, b = F.pad(self.lora_A.to(x.dtype), (0, 0, 0, fill)), F.pad(self.lora_B.to(x.dtype), (0, fill))
        seen = F.dropout(x, self.update.dropout, self.training)
        return out + self.scale * grouped_product(grouped_product(seen, a, offsets), b, offsets)

    def merged_weight(self) -> torch.Tensor:
        with torch.no_grad():
            update = self.scale * (self.lora_B.float() @ self.lora_A.float())
            return self.base.dense(torch.float32) + update

    def merged(self) -> nn.Module:
        weight = self.merged_weight().to(self.base.dense().dtype)
        return ExpertsLinear(nn.Parameter(weight, requires_grad=False))


class LowRank(base.Tuner[L]):
    """The walk that LoRA and DoRA share: which sites, which ranks, what the file's config says."""

    def __init__(self, options: L) -> None:
        super().__init__(options)
        self._updates: dict[str, Update] = {}
        self._every: tuple[str, ...] = ()
        self._conv1d = False

    def wrap(self, model: nn.Module, anatomy: Anatomy, kernels: str) -> list[base.Wrapper]:
        self._every = tuple(name for name, _ in model.named_modules())
        self._updates = self.plan(anatomy, kernels)
        made: list[base.Wrapper] = []
        for site in anatomy.sites:
            made.append(self.layer(model, site, self._updates[site.name]))
        _file_experts(made)
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

    def readable(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Without the base's own embedding and head, which PEFT files beside their updates."""
        own = {
            f"{base.FILE_PREFIX}{wrapper.name}.base_layer.{leaf}": getattr(wrapper, leaf, None)
            for wrapper in base.wrappers(model)
            for leaf in ("weight", "bias")
        }
        kept = {}
        for name, tensor in tensors.items():
            weight = own.get(name)
            if weight is None:
                kept[name] = tensor
            elif weight.shape != tensor.shape or not torch.equal(weight.cpu(), tensor.to(weight.dtype)):
                raise UserError(
                    f"adapter: its {name} {tuple(tensor.shape)} is not this base's {tuple(weight.shape)}: it was "
                    "trained on another base, or with tokens added to the vocabulary"
                )
        return kept

    def meaning(self) -> dict[str, Any]:
        o = self.options
        return {
            "peft_type": "LORA",
            "r": o.rank,
            "lora_alpha": o.alpha,
            "use_rslora": o.rslora,
            "use_dora": self.kind == "dora",
            "rank_pattern": {name: u.rank for name, u in self._updates.items() if u.rank != o.rank},
            "alpha_pattern": {name: u.alpha for name, u in self._updates.items() if u.alpha != o.alpha},
        }

    def adapter_config(self, anatomy: Anatomy, base_name: str) -> dict[str, Any]:
        o, plan = self.options, self._updates
        experts = {site.name for site in anatomy.sites if site.role.startswith("experts")}
        kept = [wrapper for wrapper, chosen in _kept_names(anatomy, o.modules_to_save).items() if chosen]
        config = {
            **self.meaning(),
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            # PEFT has no dropout for experts, and refuses the file
            "lora_dropout": 0.0 if experts else o.dropout,
            "bias": "none",
            "fan_in_fan_out": self._conv1d,
            "inference_mode": True,
            "init_lora_weights": "gaussian" if o.init == "gaussian" else True,
            "target_modules": peft_targets(plan.keys() - experts, self._every),
            "target_parameters": sorted(experts) or None,
            "modules_to_save": kept or None,
        }
        if kept and anatomy.tied:
            config["ensure_weight_tying"] = True
        return config


class Tuner(LowRank[Options]):
    """LoRA on linear layers, embeddings and experts."""

    def layer(self, model: nn.Module, site: Site, update: Update) -> base.Wrapper:
        if site.role.startswith("experts"):
            return LoRAExperts(site.name, grouped(model, site.name), update)
        module = model.get_submodule(site.name)
        if isinstance(module, nn.Embedding):
            return LoRAEmbedding(site.name, module, update)
        return LoRALinear(site.name, module, update)


def grouped(model: nn.Module, name: str) -> nn.Module:
    """The experts' product `name` as a module of its own; its sublayer is turned into such modules where it is not yet.

    Raises UserError where that cannot be done.
    """
    sublayer = model.get_submodule(name.rpartition(".")[0])
    reason = None if isinstance(sublayer, GroupedExperts) else why_not(sublayer)
    if reason:
        raise UserError(f"targets: {name} holds experts that cannot be tuned apart: {reason}. Name other targets")
    group_experts(sublayer, lambda _, parameter: ExpertsLinear(parameter))
    return model.get_submodule(name)


def _file_experts(made: list[base.Wrapper]) -> None:
    """Names the experts' updates as PEFT does: one wrapper inside the other on the sublayer, the last one outermost."""
    sublayers: dict[str, list[LoRAExperts]] = {}
    for wrapper in made:
        if isinstance(wrapper, LoRAExperts):
            sublayers.setdefault(wrapper.name.rpartition(".")[0], []).append(wrapper)
    for sublayer, inside in sublayers.items():
        for depth, wrapper in enumerate(reversed(inside)):
            wrapper.filed = sublayer + ".base_layer" * depth


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
            a.copy_((torch.rand(a.shape, generator=generator) * 2 - 1) / math.sqrt(a.shape[-1]))
