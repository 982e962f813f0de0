"""DoRA (Liu et al. 2024): W' = m (W + s B A) / ‖W + s B A‖, LoRA for the direction and a trained length m of each row.

m starts at ‖W‖ over the input of each output unit, so the first step sees the base itself. Over any stored base.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn

from ftrun.errors import UserError
from ftrun.kernels import dora as product
from ftrun.kernels.dense import dense_weight
from ftrun.kernels.lora import Factors, fast
from ftrun.methods import base, lora
from ftrun.methods.low_rank import LowRank, Update
from ftrun.methods.options import LowRankOptions
from ftrun.values import Site


@dataclass(frozen=True)
class Options(LowRankOptions):
    """DoRA's: those of every low-rank update."""


class DoRALinear(lora.LoRALinear):
    """A frozen linear layer with B A beside it and a trained length of each output unit."""

    def __init__(self, name: str, layer: nn.Module, update: Update) -> None:
        super().__init__(name, layer, update)
        self.magnitude = base.parameter((self.lora_B.shape[0],), layer, update.dtype)
        self._trained: torch.Tensor | None = None  # the lengths as trained, once they were rescaled
        self.square: torch.Tensor
        # ‖W‖² of each row: derived from the base, so it is in no file
        self.register_buffer("square", torch.zeros_like(self.magnitude, dtype=torch.float32), persistent=False)

    def own(self) -> dict[str, base.Trained]:
        return {**super().own(), "lora_magnitude_vector": base.Trained("magnitude", self.magnitude)}

    def prepare(self) -> None:
        with torch.no_grad():
            self.square.copy_(product.squares(dense_weight(self.base)))

    def reset(self, seed: int) -> None:
        super().reset(seed)
        with torch.no_grad():
            self.magnitude.copy_(self.square.sqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return self.base(x)
        if self.settled:
            return self.joined(x, self.base(x))
        layer, dtype, dropout = self.base, x.dtype, self.update.dropout if self.training else 0.0
        trained = (self.lora_A, self.lora_B, self.magnitude, self.scale)
        if self.update.kernels == "reference":
            return product.reference(x, dense_weight(layer, dtype), self.bias, *trained, dropout)
        if dropout:
            return product.dropping(x, lambda: dense_weight(layer, dtype), self.bias, self.square, *trained, dropout)
        return fast(x, self._factors())[0]

    def _factors(self) -> Factors:
        weight = functools.partial(dense_weight, self.base)
        trained = (self.lora_A, self.lora_B, self.magnitude, self.scale)
        return product.factors(weight, self.bias, self.square, *trained)

    def rescale(self, factor: float) -> None:
        """The lengths go from the base's own rows' to the trained ones as the direction does."""
        super().rescale(factor)
        if self._trained is None:
            self._trained = self.magnitude.detach().clone()
        own, trained = self.square.sqrt(), self._trained.float()
        with torch.no_grad():
            self.magnitude.copy_(trained if factor == 1 else own + factor * (trained - own))

    def merged_weight(self) -> torch.Tensor:
        with torch.no_grad():
            own = dense_weight(self.base)
            crossed = product.cross(own, self.lora_A)
            norm = product.factored_norm(self.square, crossed, self.lora_A, self.lora_B, self.scale)
            return (self.magnitude.float() / norm)[:, None] * super().merged_weight()


class Tuner(LowRank[Options]):
    """DoRA on linear layers."""

    def layer(self, model: nn.Module, site: Site, update: Update) -> base.Wrapper:
        if site.role.startswith("experts"):
            raise UserError(f"method=dora: {site.name} holds experts as one parameter, which only method=lora tunes")
        module = model.get_submodule(site.name)
        if isinstance(module, nn.Embedding):
            raise UserError(
                "method=dora: targets=embeddings is not possible, the norm is that of a linear layer; train it in "
                "full by method.modules_to_save=[embeddings], or use method=lora"
            )
        return DoRALinear(site.name, module, update)
