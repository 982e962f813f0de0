"""LoRA (Hu et al. 2021): W' = W + s B A beside every selected weight, s = alpha / rank, or alpha / √rank (rsLoRA).

A (rank, in) is drawn, B (out, rank) starts at zero, so the first step sees the base itself. Files are PEFT's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ftrun.errors import UserError
from ftrun.kernels import lora as product
from ftrun.kernels.dense import dense_weight, features
from ftrun.kernels.experts import ExpertsLinear, GroupedExperts, group_experts, grouped_product, why_not
from ftrun.methods import base
from ftrun.methods.kept import embed_scale
from ftrun.methods.low_rank import LowRank, Update, draw_a
from ftrun.methods.options import LowRankOptions
from ftrun.values import Site


@dataclass(frozen=True)
class Options(LowRankOptions):
    """LoRA's: those of every low-rank update."""


class LoRALinear(base.Wrapper):
    """A frozen linear layer of any storage, and B A beside it. x (…, in) -> (…, out) in the dtype of x."""

    def __init__(self, name: str, layer: nn.Module, update: Update) -> None:
        super().__init__(name, layer)
        self.update, self.scale = update, update.scale
        wide, tall = features(layer)
        self.lora_A = base.parameter((update.rank, wide), layer, update.dtype)
        self.lora_B = base.parameter((tall, update.rank), layer, update.dtype)
        self._kept: product.Settled | None = None

    def own(self) -> dict[str, base.Trained]:
        return {"lora_A.weight": base.Trained("A", self.lora_A), "lora_B.weight": base.Trained("B", self.lora_B)}

    def reset(self, seed: int) -> None:
        draw_a(self.lora_A, self.update, self.generator(seed))
        nn.init.zeros_(self.lora_B)

    def settle(self, on: bool) -> None:
        super().settle(on)
        self._kept = None

    def joined(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        made = self._kept
        if made is None or made.a.dtype != x.dtype:
            made = product.settled(self._factors(), x.dtype)
            self._kept = made if self.settled else None
        return product.joined(x, out, made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return self.base(x)
        if self.settled:
            return self.joined(x, self.base(x))
        dropout = self.update.dropout if self.training else 0.0
        if self.update.kernels == "reference":
            return product.reference(x, self.base, self.lora_A, self.lora_B, self.scale, dropout)
        return product.fast(x, self._factors(), dropout=dropout)[0]

    def factors(self) -> product.Factors | None:
        """For a product that is shared with other layers of the same input; None where this one must run alone."""
        alone = self.update.kernels == "reference" or self.settled or (self.training and self.update.dropout)
        return None if alone or not self.enabled else self._factors()

    def _factors(self) -> product.Factors:
        weight = functools.partial(dense_weight, self.base)
        return product.Factors(weight, self.bias, self.lora_A, self.lora_B, self.scale)

    def rescale(self, factor: float) -> None:
        self.scale, self._kept = self.update.scale * factor, None

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
        return self.joined(ids, out) if self.enabled else out

    def joined(self, ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        narrow = F.embedding(ids, self.lora_A.T, self.base.padding_idx)
        update = self.scale * (narrow.to(out.dtype) @ self.lora_B.T.to(out.dtype))
        factor = embed_scale(self.base)
        return out + (update if factor is None else update * factor.to(out.dtype))

    def rescale(self, factor: float) -> None:
        self.scale = self.update.scale * factor

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

    def rescale(self, factor: float) -> None:
        self.scale = self.update.scale * factor

    def merged_weight(self) -> torch.Tensor:
        with torch.no_grad():
            update = self.scale * (self.lora_B.float() @ self.lora_A.float())
            return self.base.dense(torch.float32) + update

    def merged(self) -> nn.Module:
        weight = self.merged_weight().to(self.base.dense().dtype)
        return ExpertsLinear(nn.Parameter(weight, requires_grad=False))


class Tuner(LowRank[Options]):
    """LoRA on linear layers, embeddings and experts."""

    def layer(self, model: nn.Module, site: Site, update: Update) -> base.Wrapper:
        if site.role.startswith("experts"):
            return LoRAExperts(site.name, grouped(model, site.name), update)
        module = model.get_submodule(site.name)
        if isinstance(module, nn.Embedding):
            return LoRAEmbedding(site.name, module, update)
        return LoRALinear(site.name, module, update)

    def file(self, made: list[base.Wrapper]) -> None:
        """Experts as PEFT has them: one wrapper inside the other on their sublayer, the last one outermost."""
        sublayers: dict[str, list[base.Wrapper]] = {}
        for wrapper in made:
            if isinstance(wrapper, LoRAExperts):
                sublayers.setdefault(wrapper.name.rpartition(".")[0], []).append(wrapper)
        for sublayer, inside in sublayers.items():
            for depth, wrapper in enumerate(reversed(inside)):
                wrapper.filed = sublayer + ".base_layer" * depth


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
