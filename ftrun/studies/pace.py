"""How long jobs take: their counted work at this device's rate, corrected by what the jobs before came to."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from ftrun.beside import replace_text
from ftrun.runs import cache_dir, read_json

_KEPT = 20  # ratios remembered of a device
_SHARE = 0.2  # of a device's measured product rate, what training reaches where nothing else is known


class Pace:
    """Ratios of measured seconds to counted work, the newest last; kept in the cache for each device's name."""

    def __init__(self) -> None:
        self._path = cache_dir() / "pace.json"
        self._device, self._rate = "", 0.0
        self._ratios: list[float] = []

    def meet(self, plan: Mapping[str, Any]) -> None:
        """What a plan tells of the device: its name, and its rate of products in operations a second."""
        device = plan.get("device") or {}
        if device.get("name") and not self._device:
            self._device, self._rate = str(device["name"]), float(device.get("rate") or 0.0)
            self._ratios = list((self._all().get(self._device) or [])[-_KEPT:])

    def note(self, plan: Mapping[str, Any], seconds: float) -> None:
        """A job that ended: what it was planned to be, and how long it took."""
        if not plan.get("work") or not self._device:
            return
        self._ratios = [*self._ratios, seconds / float(plan["work"])][-_KEPT:]
        kept = {**self._all(), self._device: self._ratios}
        try:
            replace_text(self._path, json.dumps(kept))
        except OSError:
            self._path = self._path.with_name(".unwritable")  # a cache that takes nothing: known for this study alone

    def seconds(self, plan: Mapping[str, Any]) -> float | None:
        """How long a job takes; None where its work or the device's rate is unknown."""
        work = plan.get("work")
        if not work or not (self._ratios or self._rate):
            return None
        return float(work) * (statistics.median(self._ratios) if self._ratios else 1 / (_SHARE * self._rate))

    def total(self, plans: Iterable[Mapping[str, Any]], width: int = 1) -> float | None:
        """How long several jobs take, `width` at once; None where nothing is known of one of them."""
        each = [self.seconds(plan) for plan in plans]
        return None if None in each else sum(s for s in each if s is not None) / max(1, width)

    @property
    def source(self) -> str:
        """What the times rest on, in words."""
        if self._ratios:
            return f"by the last {len(self._ratios)} jobs on this device"
        return "by this device's rate of matrix products: rough until a job has ended"

    @staticmethod
    def words(seconds: float | None) -> str:
        """ "40 s", "12 min", "3.5 h" """
        if seconds is None:
            return "of unknown length"
        return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

    def _all(self) -> dict[str, Any]:
        try:
            return read_json(self._path) or {}
        except ValueError:
            return {}
