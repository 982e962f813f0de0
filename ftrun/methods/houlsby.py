"""Bottleneck adapters (Houlsby et al. 2019): h + up(f(down(h))) after attention and after the feed-forward.

`up` starts at zero, so the first step sees the base itself. They stay in the model: they do not merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ftrun.errors import UserError
from ftrun.methods import base
from ftrun.schema import option
from ftrun.selection import parse_layers
from ftrun.values import Anatomy, Block

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Options:
    bottleneck: int = option(64, "width of the bottleneck: about 2 · width · bottleneck parameters each", ge=1)
    placement: str = option("both", "where adapters go in a layer", choices=("both", "ffn", "parallel"))
    activation: str = option("gelu", "the bottleneck's nonlinearity", choices=("gelu", "relu", "silu", "tanh"))
    layers: str | int | list[str | int] = option("all", "which decoder layers: all, 0-7, last:8, first:8, every:2")
    dtype: str = option("float32", "dtype of the adapters", choices=("float32", "bfloat16"))
    from_: str | None = option(None, "folder of an adapter to start from", alias="from")

    def __post_init__(self) -> None:
        parse_layers(self.layers)


class Bottleneck(base.Wrapper):
    """A module of the base with a bottleneck on its output (serial) or on its input, beside it (parallel)."""

    def __init__(self, name: str, module: nn.Module, width: int, options: Options) -> None:
        super().__init__(name, module)
        self.factor = 1.0
        self.parallel, self.activation = options.placement == "parallel", options.activation
        dtype, size = getattr(torch, options.dtype), options.bottleneck
        self.down = base.parameter((size, width), module, dtype)
        self.down_bias = base.parameter((size,), module, dtype)
        self.up = base.parameter((width, size), module, dtype)
        self.up_bias = base.parameter((width,), module, dtype)

    def own(self) -> dict[str, base.Trained]:
        return {
            "adapter_down.weight": base.Trained("other", self.down),
            "adapter_down.bias": base.Trained("vectors", self.down_bias),
            "adapter_up.weight": base.Trained("other", self.up),
            "adapter_up.bias": base.Trained("vectors", self.up_bias),
        }

    def reset(self, seed: int) -> None:
        bound, generator = 1 / math.sqrt(self.down.shape[1]), self.generator(seed)
        with torch.no_grad():
            self.down.copy_((torch.rand(self.down.shape, generator=generator) * 2 - 1) * bound)
        for parameter in (self.down_bias, self.up, self.up_bias):
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> Any:
        out: Any = self.base(x)
        return self.joined(x, out) if self.enabled else out

    def joined(self, x: torch.Tensor, out: Any) -> Any:
        # some mixtures of experts give their router's scores as well
        first, *rest = out if isinstance(out, tuple) else (out,)
        update = self.bottleneck(x if self.parallel else first)
        first = first + (update if self.factor == 1 else self.factor * update)
        return (first, *rest) if isinstance(out, tuple) else first

    def rescale(self, factor: float) -> None:
        self.factor = factor

    def bottleneck(self, h: torch.Tensor) -> torch.Tensor:
        """up(f(down(h))) for h (…, width), in the dtype of h."""
        narrow = F.linear(h, self.down.to(h.dtype), self.down_bias.to(h.dtype))
        return F.linear(_ACTIVATIONS[self.activation](narrow), self.up.to(h.dtype), self.up_bias.to(h.dtype))


class Tuner(base.Tuner[Options]):
    """Two bottlenecks a layer (both), one after the feed-forward (ffn), or one beside it (parallel)."""

    needs = "blocks"
    last_factors = ("adapter_up.weight",)
    merges = False
    why_not = "a nonlinearity stands between its two matrices, so no single matrix does what they do"

    def wrap(self, model: nn.Module, anatomy: Anatomy, kernels: str) -> list[base.Wrapper]:
        return [
            Bottleneck(name, model.get_submodule(name), anatomy.width, self.options)
            for block in anatomy.blocks
            for name in self._places(block)
        ]

    def _places(self, block: Block) -> list[str]:
        placement = self.options.placement
        if placement == "parallel":
            if block.ffn is None:
                raise UserError(
                    f"method.placement=parallel: {block.name} has no feed-forward module of its own to stand beside; "
                    "use method.placement=both or ffn"
                )
            return [block.ffn]
        after = block.ffn_out or block.ffn
        if after is None:
            raise UserError(f"method.placement={placement}: {block.name} has no feed-forward module to stand after")
        return [block.attention_out, after] if placement == "both" else [after]

    def check(self, config: Mapping[str, Any]) -> None:
        self.check_same(config, self._meaning())

    def _meaning(self) -> dict[str, Any]:
        o = self.options
        return {
            "method": "houlsby",
            "bottleneck": o.bottleneck,
            "placement": o.placement,
            "activation": o.activation,
        }

    def adapter_config(self, anatomy: Anatomy, base_name: str) -> dict[str, Any]:
        layers = [block.index for block in anatomy.blocks]
        return {**self._meaning(), "base_model_name_or_path": base_name, "layers": layers}
