"""The process of this machine that plans the jobs of a study whose jobs run elsewhere."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from ftrun.studies.launching import Event, Task
from ftrun.studies.worker import Worker


class Planner:
    """One worker for one plan after the other, started with the first and again when it is lost."""

    def __init__(self, log: Path) -> None:
        """log: where what it prints goes."""
        self._log = log
        self._worker: Worker | None = None
        self._waiting: deque[Task] = deque()
        self._task: Task | None = None

    @property
    def busy(self) -> bool:
        """Whether plans are still to come."""
        return self._task is not None or bool(self._waiting)

    def submit(self, task: Task) -> None:
        """Take a task to plan."""
        self._waiting.append(task)
        self._next()

    def hear(self) -> list[Event]:
        """The plans that are made."""
        replies = self._worker.receive() if self._worker is not None else []
        if replies is None:
            return self._lost()
        events = [Event(reply["id"], reply["event"], reply) for reply in replies]
        if events:
            self._task = None
            self._next()
        return events

    def drop(self) -> None:
        """Plans that have not been begun are not wanted any more."""
        self._waiting.clear()

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            if self._task is None:
                self._worker.end()
            else:
                self._worker.kill()
            self._worker = None

    def _next(self) -> None:
        if self._task is None and self._waiting:
            self._worker = self._worker or Worker(self._log)
            self._task = self._waiting.popleft()
            self._worker.send(self._task.as_dict())

    def _lost(self) -> list[Event]:
        assert self._worker is not None
        reason, task = self._worker.epitaph(), self._task
        self._worker = self._task = None
        self._next()
        return [] if task is None else [Event(task.id, "ended", {"status": "failed", "reason": reason})]
