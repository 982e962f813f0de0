"""What LoRA and DoRA share: which sites get an update of which size, how A starts, and PEFT's config of it all."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ftrun.errors import UserError
from ftrun.kernels.dense import is_conv1d
from ftrun.kernels.spectrum import effective_rank, singular_values
from ftrun.methods import base
from ftrun.methods.files import peft_targets
from ftrun.methods.kept import keep
from ftrun.methods.options import LowRankOptions
from ftrun.methods.patterns import resolve
from ftrun.values import Anatomy, Site

# starts of PEFT's that take the update's first value out of the base
_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
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


class LowRank(base.Tuner[L]):
    """The walk that LoRA and DoRA share: which sites, which ranks, what the file's config says."""

    last_factors = ("lora_B.weight", "lora_embedding_A")

    def __init__(self, options: L) -> None:
        super().__init__(options)
        self._updates: dict[str, Update] = {}
        self._every: tuple[str, ...] = ()
        self._conv1d = False
        self._sites: tuple[Site, ...] = ()
        self._depth = 0

    def wrap(self, model: nn.Module, anatomy: Anatomy, kernels: str) -> list[base.Wrapper]:
        self._every = tuple(name for name, _ in model.named_modules())
        self._sites, self._depth = anatomy.sites, anatomy.depth
        self._updates = self.plan(anatomy, kernels)
        made: list[base.Wrapper] = []
        for site in anatomy.sites:
            made.append(self.layer(model, site, self._updates[site.name]))
        self.file(made)
        self._conv1d = any(is_conv1d(wrapper.base) for wrapper in made)
        made += keep(model, anatomy, self.options.modules_to_save, getattr(torch, self.options.dtype))
        for name, count in Counter(wrapper.name for wrapper in made).items():
            if count > 1:
                raise UserError(
                    f"method.modules_to_save: {name} is selected by targets too; a module is trained in full or by an "
                    "update, not by both"
                )
        return made

    def layer(self, model: nn.Module, site: Site, update: Update) -> base.Wrapper:
        """The wrapper of one site."""
        raise NotImplementedError

    def file(self, made: list[base.Wrapper]) -> None:
        """Gives wrappers the names of PEFT's file where they differ from the module's."""

    def plan(self, anatomy: Anatomy, kernels: str) -> dict[str, Update]:
        """Each selected weight's rank, alpha and scale, by name."""
        o = self.options
        ranks = resolve(o.rank_pattern, "rank_pattern", anatomy.sites, anatomy.depth, o.rank)
        alphas = resolve(o.alpha_pattern, "alpha_pattern", anatomy.sites, anatomy.depth, o.alpha)
        made = {}
        for name, rank in ranks.items():
            scale = scale_of(rank, alphas[name], o.rslora)
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
            elif weight.shape != tensor.shape or not (
                weight.is_meta or torch.equal(weight.cpu(), tensor.to(weight.dtype))
            ):
                raise UserError(
                    f"adapter: its {name} {tuple(tensor.shape)} is not this base's {tuple(weight.shape)}: it was "
                    "trained on another base, or with tokens added to the vocabulary"
                )
        return kept

    def check(self, config: Mapping[str, Any]) -> None:
        self.check_same(config, {"peft_type": "LORA", "use_dora": self.kind == "dora"})
        start = config.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_CHANGING):
            raise UserError(
                f"adapter: its init_lora_weights={start!r} changed the base's weights, which are not at hand"
            )
        rank, alpha, root = config.get("r", 8), config.get("lora_alpha", 8), config.get("use_rslora", False)
        ranks = self._resolved(config, "rank_pattern", rank)
        alphas = self._resolved(config, "alpha_pattern", alpha)
        for name, update in self._updates.items():
            scale = scale_of(ranks[name], alphas[name], root)
            if ranks[name] != update.rank or not math.isclose(scale, update.scale):
                raise UserError(
                    f"adapter: {name} has rank {ranks[name]} and scale {scale:g} there, rank {update.rank} and scale "
                    f"{update.scale:g} by this job's rank, alpha and rslora"
                )

    def _resolved(self, config: Mapping[str, Any], key: str, default: float) -> dict[str, float]:
        """PEFT's patterns for the selected sites; there, an entry may fit none."""
        patterns = config.get(key) or {}
        numbers = [default, *patterns.values()] if isinstance(patterns, Mapping) else []
        if not numbers or not all(isinstance(n, int | float) and 0 < n < 1e9 for n in numbers):
            raise UserError(
                f"adapter: rank, alpha or {key}: expected numbers above 0, found {[default, patterns]!r:.120}"
            )
        found = {site.name: default for site in self._sites}
        for site in self._sites:
            for entry, value in patterns.items():
                try:
                    fits = re.match(rf"(.*\.)?({entry})$", site.name)
                except re.error as error:
                    raise UserError(f"adapter: {key}: {entry!r:.60} is no pattern: {error}") from error
                if fits:
                    found[site.name] = value
                    break
        return found

    def effective_ranks(self, model: nn.Module) -> dict[str, float] | None:
        """Those of B A; for experts the mean over them. 0 where nothing is learnt yet: B (an embedding's A) is zero."""
        found = {}
        for wrapper in base.wrappers(model):
            if wrapper.name in self._updates:
                a, b = wrapper.lora_A, wrapper.lora_B
                assert isinstance(a, torch.Tensor)
                assert isinstance(b, torch.Tensor)
                found[wrapper.name] = effective_rank(singular_values(a, b)).mean()
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else None

    def adapter_config(self, anatomy: Anatomy, base_name: str) -> dict[str, Any]:
        o, plan = self.options, self._updates
        experts = {site.name for site in anatomy.sites if site.role.startswith("experts")}
        kept = [wrapper for wrapper, chosen in _kept_names(anatomy, o.modules_to_save).items() if chosen]
        config = {
            "peft_type": "LORA",
            "r": o.rank,
            "lora_alpha": o.alpha,
            "use_rslora": o.rslora,
            "use_dora": self.kind == "dora",
            "rank_pattern": {name: u.rank for name, u in plan.items() if u.rank != o.rank},
            "alpha_pattern": {name: u.alpha for name, u in plan.items() if u.alpha != o.alpha},
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


def _kept_names(anatomy: Anatomy, roles: list[str]) -> dict[str, bool]:
    everything = anatomy.tied and bool(roles)
    return {
        anatomy.embeddings: everything or "embeddings" in roles,
        anatomy.head: everything or "head" in roles,
    }


def scale_of(rank: float, alpha: float, rslora: bool) -> float:
    """The factor of B A: alpha / rank, or alpha / √rank."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def draw_a(a: nn.Parameter, update: Update, generator: torch.Generator) -> None:
    """A's first values as PEFT draws them: uniform in ±1/√in (Kaiming with a = √5), or normal with deviation 1/rank."""
    with torch.no_grad():
        if update.init == "gaussian":
            a.copy_(torch.randn(a.shape, generator=generator) / update.rank)
        else:
            a.copy_((torch.rand(a.shape, generator=generator) * 2 - 1) / math.sqrt(a.shape[-1]))
