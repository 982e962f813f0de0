"""Trackio: a local database in RUN/trackio, one for all runs of a study in STUDY/trackio, or where TRACKIO_DIR says.

`trackio show` opens its dashboard.
"""

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
        # trackio reads it once, when it is imported: a later run of this process, one of the same study, has it too
        os.environ.setdefault("TRACKIO_DIR", str(_place(run)))
        from accelerate.tracking import TrackioTracker

        return TrackioTracker(options.project, name=name, group=options.group, resume="allow", embed=False)

    return Background("trackio", make, say, options.every)


def _place(run: Path) -> Path:
    """Where the database of a run lies."""
    study = run.absolute().parent.parent
    return (study if (study / "study.yaml").exists() else run.absolute()) / "trackio"
