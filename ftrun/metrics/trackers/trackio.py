"""Trackio: a local database in RUN/trackio, or where TRACKIO_DIR says. `trackio show` opens its dashboard."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.metrics.background import Background
from ftrun.metrics.options import TrackerOptions
from ftrun.metrics.sink import Sink
from ftrun.schema import option


@dataclass(frozen=True)
class Options(TrackerOptions):
    package = "trackio"
    install = "ftrun[trackio]"
    group: str | None = option(None, "runs of one group are shown together")


def sink(options: Options, name: str, say: Callable[[str], None]) -> Sink | None:
    """name: the run's. say: takes a line for the user."""

    def make(run: Path, tell: Callable[[str], None]) -> Any:
        # trackio reads it once, when it is imported
        os.environ.setdefault("TRACKIO_DIR", str(run / "trackio"))
        from accelerate.tracking import TrackioTracker

        return TrackioTracker(options.project, name=name, group=options.group, resume="allow", embed=False)

    return Background("trackio", make, say, options.every)
