"""TensorBoard: event files in RUN/tensorboard. `tensorboard --logdir runs` shows them side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.metrics.background import Background
from ftrun.metrics.options import LogOptions
from ftrun.metrics.sink import Sink
from ftrun.schema import option


@dataclass(frozen=True)
class Options(LogOptions):
    package = "tensorboard"
    install = "ftrun[tensorboard]"
    every: int = option(1, "write each so many steps; evaluations are always written", ge=1)


def sink(options: Options, name: str, say: Callable[[str], None]) -> Sink | None:
    """name: the run's. say: takes a line for the user."""

    def make(run: Path, tell: Callable[[str], None]) -> Any:
        from accelerate.tracking import TensorBoardTracker

        return TensorBoardTracker("", logging_dir=str(run / "tensorboard"))

    return Background("tensorboard", make, say, options.every)
