"""How long jobs take: their counted work at this device's rate, corrected by what the jobs before came to."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from ftrun.beside import replace_text
from ftrun.runs import cache_dir, read_json

_KEPT = 40  # jobs remembered of a device
_ALIKE = (
    6.0  # times as much work, or as little, at most: a small job is mostly start and end, and says nothing of rates
)
_SHARE = 0.2  # of a device's measured product rate, what training reaches where nothing else is known


class Pace:
    """Counted work and measured seconds of the last jobs; kept in the cache for each device's name."""

    def __init__(self) -> None:
        self._path = cache_dir() / "pace.json"
        self._device, self._rate = "", 0.0
        self._jobs: list[list[float]] = []  # [work, seconds], the newest last

    def meet(self, plan: Mapping[str, Any]) -> None:
        """What a plan tells of the device: its name, and its rate of products in operations a second."""
        device = plan.get("device") or {}
        if device.get("name") and not self._device:
            self._device, self._rate = str(device["name"]), float(device.get("rate") or 0.0)
            self._jobs = self._all().get(self._device, [])[-_KEPT:]

    def note(self, plan: Mapping[str, Any], seconds: float) -> None:
        """A job that ended: what it was planned to be, and how long it took."""
        if not plan.get("work") or not self._device:
            return
        self._jobs = [*self._jobs, [float(plan["work"]), seconds]][-_KEPT:]
        kept = {**self._all(), self._device: self._jobs}
        try:
            replace_text(self._path, json.dumps(kept))
        except OSError:
            self._path = self._path.with_name(".unwritable")  # a cache that takes nothing: known for this study alone

    def seconds(self, plan: Mapping[str, Any]) -> float | None:
        """How long a job takes; None where its work or the device's rate is unknown."""
        work = float(plan.get("work") or 0)
        known = self._alike(work)
        if not work or not (known or self._rate):
            return None
        return work * (statistics.median(known) if known else 1 / (_SHARE * self._rate))

    def total(self, plans: Iterable[Mapping[str, Any]], width: int = 1) -> float | None:
        """How long several jobs take, `width` at once; None where nothing is known of one of them."""
        each = [self.seconds(plan) for plan in plans]
        return None if None in each else sum(s for s in each if s is not None) / max(1, width)

    def source(self, plans: Iterable[Mapping[str, Any]]) -> str:
        """What the times of these jobs rest on, in words."""
        if all(self._alike(float(plan.get("work") or 0)) for plan in plans):
            return "by the last jobs of their size on this device"
        return "by this device's rate of matrix products: rough until a job of this size has ended"

    def _alike(self, work: float) -> list[float]:
        """Seconds a unit of work of jobs of about this size."""
        return [s / w for w, s in self._jobs if w and work / _ALIKE <= w <= work * _ALIKE]

    @staticmethod
    def words(seconds: float | None) -> str:
        """ "40 s", "12 min", "3.5 h" """
        if seconds is None:
            return "of unknown length"
        return (
            f"{seconds:.0f} s"
            if seconds < 90
            else f"{seconds / 60:.0f} min"
            if seconds < 5400
            else f"{seconds / 3600:.1f} h"
        )

    def _all(self) -> dict[str, list[list[float]]]:
        try:
            found = read_json(self._path) or {}
            return {name: [[float(work), float(seconds)] for work, seconds in jobs] for name, jobs in found.items()}
        except (ValueError, TypeError, AttributeError):
            return {}  # damaged: begun anew
