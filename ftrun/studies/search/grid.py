"""Every combination of the swept values, the last key fastest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ftrun.studies.searching import Search as Base
from ftrun.studies.searching import Trial, grid
from ftrun.studies.study import Axis


@dataclass(frozen=True)
class Options:
    """Nothing to choose."""

    grows: ClassVar[tuple[str, ...]] = ("axes",)


class Search(Base):
    """Asks for one point after the other; what the earlier ones came to changes nothing."""

    def __init__(self, options: Options, axes: Sequence[Axis], overrides: Sequence[str]) -> None:
        super().__init__(options, axes, overrides)
        self._points: list[Mapping[str, Any]] = list(grid(axes))
        self._asked = 0

    def ask(self) -> Trial | None:
        if self._asked == len(self._points):
            return None
        self._asked += 1
        return Trial(self._asked - 1, self._points[self._asked - 1])

    def points(self) -> list[Mapping[str, str]]:
        return list(self._points)
