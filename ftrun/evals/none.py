"""No evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Options:
    """Nothing to choose."""

    evaluates: ClassVar[bool] = False
