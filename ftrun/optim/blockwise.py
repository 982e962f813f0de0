"""bitsandbytes' optimisers, made fit for fake tensors. Importing this imports bitsandbytes, which takes seconds."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer1State, Optimizer2State
from torch._subclasses.fake_tensor import FakeTensor


class _Fit:
    """A group's own `bits`, where it has them; and the map from 8-bit codes to numbers, 256 float32.

    bitsandbytes computes the map with `item()`, which fake tensors do not have.
    """

    name2qmap: dict[str, torch.Tensor]

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config(gindex, pindex, group)  # type: ignore[misc]
        return {**config, "optim_bits": group.get("bits", config["optim_bits"])}

    def fill_qmap(self) -> None:
        if isinstance(torch.empty(0), FakeTensor):
            self.name2qmap = {name: torch.empty(256) for name in ("dynamic", "udynamic")}
        else:
            super().fill_qmap()  # type: ignore[misc]


class TwoMoments(_Fit, Optimizer2State):
    """Adam's family. State of a parameter: state1 and state2, with qmap and absmax where they are uint8."""


class OneMoment(_Fit, Optimizer1State):
    """Lion's family. State of a parameter: state1, with qmap1 and absmax1 where it is uint8."""


def make(kind: type[Any], name: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """The optimiser; what `Options.notes` says of paging is not said again in bitsandbytes' words."""
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    made: torch.optim.Optimizer = kind(name, groups, **options)
    return made
