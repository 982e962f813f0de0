"""Options that trackers share, and the check that their packages are here. Light: no tracker is imported."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

from ftrun.errors import UserError
from ftrun.schema import option


@dataclass(frozen=True)
class LogOptions:
    """What every choice of the group has: a check that is made before anything starts."""

    package: ClassVar[str | None] = None  # what is imported
    install: ClassVar[str] = ""  # what pip is given

    def check(self) -> None:
        """UserError, naming what to install, where the tracker's package is missing."""
        if self.package and importlib.util.find_spec(self.package) is None:
            raise UserError(
                f"log={self.package}: the package {self.package!r} is not installed here. "
                f"Install it by: pip install {self.install!r}"
            )


@dataclass(frozen=True)
class TrackerOptions(LogOptions):
    project: str = option("ftrun", "the project (or experiment) that the run is filed under", pattern=r".*\S.*")
    every: int = option(1, "send each so many steps; evaluations are always sent", ge=1)
