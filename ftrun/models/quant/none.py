"""No quantisation: every weight in `model.dtype`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ftrun.models.quant.base import Quantiser as Base


@dataclass(frozen=True)
class Options:
    """Nothing to choose."""


class Quantiser(Base):
    """Covers nothing."""

    kind = "none"

    def covers(self, name: str, module: nn.Module) -> bool:
        return False

    def scheme(self) -> str:
        return "none"
