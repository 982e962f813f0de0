"""What a launcher is: it takes tasks, runs them where there is room, and tells what became of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """One thing for a worker to do: see ftrun/tasks/worker.py, which reads `request`.

    do: plan, train or probe. base: what tasks share that need the same weights in the same form. key: the job's.
    bytes: what it needs of its device at its peak, by its plan. share: the same as a part of the device.
    """

    id: str
    do: str
    key: str
    request: Mapping[str, Any]
    base: str = ""
    bytes: int = 0
    share: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """What a worker reads."""
        return {"id": self.id, "do": self.do, **self.request}


@dataclass(frozen=True)
class Event:
    """What a task has to tell. kind: planned, began, rung (an evaluation that waits for a verdict) or ended.

    An ended task's values hold its `status` and `reason`.
    """

    id: str
    kind: str
    values: Mapping[str, Any]


class Launcher(ABC):
    """Where tasks run. No task outlives the process that made the launcher, however that ends."""

    def __init__(self, options: Any, folder: Path) -> None:
        """folder: the study's. Raises UserError where the launcher cannot work on this machine."""
        self.options, self.folder = options, folder

    @property
    @abstractmethod
    def width(self) -> int:
        """How many tasks may run at once at most, as far as that is known yet."""

    @property
    def at_once(self) -> bool:
        """Whether all tasks are taken together, before anything is told of one: only what is certain can be done so."""
        return False

    @abstractmethod
    def submit(self, task: Task) -> None:
        """Take a task; it starts when there is room."""

    @abstractmethod
    def wait(self, timeout: float) -> list[Event]:
        """What has happened, as soon as anything has, or nothing after `timeout` seconds."""

    @abstractmethod
    def verdict(self, id: str, go: bool) -> None:
        """The answer to a rung: whether the task goes on."""

    @abstractmethod
    def stop(self) -> None:
        """Ask all tasks to save a checkpoint and end; those that have not begun are dropped."""

    @abstractmethod
    def close(self) -> None:
        """End every process at once."""
