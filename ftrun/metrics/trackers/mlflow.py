"""MLflow: to the server that MLFLOW_TRACKING_URI names, else to RUN/mlflow."""

from __future__ import annotations

import importlib.util
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
    package = "mlflow"
    install = "ftrun[mlflow]"
    tags: tuple[str, ...] = option((), "labels of the run")


def sink(options: Options, name: str, say: Callable[[str], None]) -> Sink | None:
    """name: the run's. say: takes a line for the user."""

    def make(run: Path, tell: Callable[[str], None]) -> Any:
        import mlflow
        from accelerate.tracking import MLflowTracker

        files = None
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            folder = (run / "mlflow").absolute()
            folder.mkdir(exist_ok=True)
            files = (folder / "artifacts").as_uri()
            mlflow.set_tracking_uri(_store(folder))
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # it exports ours: the next run of this process has its own
        return MLflowTracker(options.project, logging_dir=files, run_name=name, tags=dict.fromkeys(options.tags, ""))

    return Background("mlflow", make, say, options.every)


def _store(folder: Path) -> str:
    """A database in the folder; plain files where MLflow came without its database (mlflow-skinny)."""
    if importlib.util.find_spec("sqlalchemy"):
        return f"sqlite:///{folder / 'mlflow.db'}"
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return folder.as_uri()
