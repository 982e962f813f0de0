"""A point of a study: some keys' values, and the job that they make of what all its jobs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.compose import compose
from ftrun.errors import UserError
from ftrun.job import Job
from ftrun.studies.study import Study, label


@dataclass(frozen=True)
class Point:
    """values: key -> value as an override writes it. key: what equal jobs share. trouble: why it is no job."""

    values: Mapping[str, str]
    job: Job | None
    key: str
    trouble: str | None = None

    @property
    def folder(self) -> str:
        """The name of its run's folder, within the study's `runs/`."""
        return f"{label(self.values)}-{self.key[:8]}"

    def request(self, out: Path) -> dict[str, Any]:
        """The job as JSON-able values, with its run's folder: what a worker needs of it."""
        assert self.job is not None
        tree = {**self.job.tree, "name": None, "out": str(out), "resume": "auto"}
        if self.job.log.kind == "wandb":  # the study's runs stand together there
            own = {key: value for key, value in tree["log"].items() if value is not None}
            tree["log"] = {**tree["log"], "group": out.parent.parent.name, "job_type": "trial", **own}
        return {"choices": self.job.choices, "tree": tree}


class Points:
    """Points of one study, each composed once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._signs = {axis.key: axis.sign for axis in study.axes}
        self._made: dict[tuple[tuple[str, str], ...], Point] = {}

    def make(self, values: Mapping[str, str]) -> Point:
        """The point of these values; one that is no valid job says why (`trouble`)."""
        found = tuple(values.items())
        if found not in self._made:
            self._made[found] = self._compose(values)
        return self._made[found]

    def line(self, values: Mapping[str, str]) -> list[str]:
        """The point as a command line."""
        swept = [f"{self._signs.get(key, '')}{key}={value}" for key, value in values.items()]
        return [*self.study.fixed, *swept]

    def _compose(self, values: Mapping[str, str]) -> Point:
        try:
            job = compose(self.line(values), self.study.config_dirs)
            job.check()
        except UserError as error:
            words = " ".join(f"{k}={v}" for k, v in sorted(values.items()))
            return Point(dict(values), None, f"invalid:{words}", str(error))
        # how a run is kept is the study's business
        return Point(dict(values), dataclasses.replace(job, name=None, out=None), job.key)
