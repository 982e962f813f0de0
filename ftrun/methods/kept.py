"""Modules trained in full beside an update: the input embedding and the head, PEFT's modules_to_save.

The trained copy lies beside the base's own weight, which stays what it was. Where the base ties embedding and head,
one copy serves both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ftrun.errors import UserError
from ftrun.methods.base import Trained, Wrapper, parameter, with_weight
from ftrun.values import Anatomy


class Kept(Wrapper):
    """An embedding or a linear layer with a trained copy of its weight (and bias) in `dtype`."""

    def __init__(self, name: str, base: nn.Module, dtype: torch.dtype, partner: Kept | None = None) -> None:
        super().__init__(name, base)
        self.kept: nn.Parameter = partner.kept if partner else parameter(tuple(self.weight.shape), base, dtype)
        self.kept_bias = None if self.bias is None else parameter(tuple(self.bias.shape), base, dtype)
        self._follows = partner is not None
        self._pair: list[nn.Parameter] | None = None
        self._trained: list[torch.Tensor] | None = None  # the values as trained, once they were rescaled
        if partner is not None:
            self._pair = partner._pair = []

    def own(self) -> dict[str, Trained]:
        found = {"weight": Trained("other", self.kept)}
        if self.kept_bias is not None:
            found["bias"] = Trained("other", self.kept_bias)
        return found

    def reset(self, seed: int) -> None:
        with torch.no_grad():
            self.kept.copy_(self.base.weight)
            if self.kept_bias is not None:
                self.kept_bias.copy_(self.base.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.joined(x, None) if self.enabled else self.base(x)

    def joined(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        # nothing of the base's own output is in it
        if not isinstance(self.base, nn.Embedding):
            bias = None if self.kept_bias is None else self.kept_bias.to(x.dtype)
            return F.linear(x, self.kept.to(x.dtype), bias)
        rows = F.embedding(x, self.kept, self.base.padding_idx).to(self.base.weight.dtype)
        return rows if (scale := embed_scale(self.base)) is None else rows * scale.to(rows.dtype)

    def rescale(self, factor: float) -> None:
        # of a tied pair the first one's values are both's
        pairs = [] if self._follows else [(self.kept, self.base.weight)]
        pairs += [] if self.kept_bias is None else [(self.kept_bias, self.base.bias)]
        if self._trained is None:
            self._trained = [kept.detach().clone() for kept, _ in pairs]
        with torch.no_grad():
            for (kept, own), trained in zip(pairs, self._trained, strict=True):
                kept.copy_(trained if factor == 1 else own.to(kept.dtype) + factor * (trained - own.to(kept.dtype)))

    def merged_weight(self) -> torch.Tensor:
        return self.kept.detach().float()

    def merged_bias(self) -> torch.Tensor | None:
        return self.kept_bias

    def merged(self) -> nn.Module:
        clone = with_weight(self.base, self.merged_weight())
        # tied before, tied after: the second of a pair takes the tensor that the first has made
        if self._pair:
            clone._parameters["weight"] = self._pair.pop()
        elif self._pair is not None:
            assert isinstance(clone.weight, nn.Parameter)
            self._pair.append(clone.weight)
        if self.kept_bias is not None:
            own = self.kept_bias.detach().to(self.base.bias.dtype)
            clone._parameters["bias"] = nn.Parameter(own, requires_grad=False)
        return clone


def embed_scale(embedding: nn.Module) -> torch.Tensor | None:
    """The factor that some embeddings (Gemma 3) multiply their rows by, or None."""
    scale = getattr(embedding, "embed_scale", None)
    return scale if scale is None or isinstance(scale, torch.Tensor) else torch.tensor(scale)


def keep(model: nn.Module, anatomy: Anatomy, roles: list[str], dtype: torch.dtype) -> list[Kept]:
    """Wrappers for the roles "embeddings" and "head"; one weight for both where the base ties them.

    Raises UserError where such a module is quantised, so that it has no weight to start from.
    """
    names = {"embeddings": anatomy.embeddings, "head": anatomy.head}
    chosen = list(names) if anatomy.tied and roles else [role for role in names if role in roles]
    made: list[Kept] = []
    for role in chosen:
        module = model.get_submodule(names[role])
        weight = getattr(module, "weight", None)
        if weight is None or not weight.is_floating_point():
            raise UserError(
                f"method.modules_to_save: {role} ({names[role]}) is quantised and cannot be trained in full"
            )
        made.append(Kept(names[role], module, dtype, made[0] if anatomy.tied and made else None))
    return made
