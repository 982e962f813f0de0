"""What launchers have in common whose jobs run on other machines: an engine starts them, the study's folder is where
both sides meet, plans are made here."""

from __future__ import annotations

import os
import sys
import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ftrun.errors import UserError
from ftrun.secrets import hide
from ftrun.studies.launching import Event, Launcher, Task
from ftrun.studies.meeting import Meeting
from ftrun.studies.planner import Planner

_LOOK = 0.2  # seconds between two looks at the folder, longer where many tasks are out
_LOOK_EACH = 0.003  # a file of a network's file system takes about that long to look at
_LATE = 60.0  # seconds that a last event may take through a network's file system


class Elsewhere(Launcher):
    """Tasks wait here until the engine takes them; what they tell comes through files.

    other: whether the jobs' machines are other ones than this.
    """

    other = True

    def __init__(self, options: Any, folder: Path) -> None:
        super().__init__(options, folder.absolute())
        self.meeting = Meeting(self.folder / "tasks", say)
        self.planner = Planner(self.folder / "workers" / "plan.log")
        self.devices: dict[str, Mapping[str, Any]] = {}  # by job: the device that its plan is for
        self.tasks: dict[str, Task] = {}  # that the engine was given
        self._waiting: list[Task] = []
        self._news: list[Event] = []  # heard and not yet told
        self._keys: dict[str, str] = {}  # of plans that are asked for
        self._over: dict[str, float] = {}  # whose processes have ended well -> when; the last event is on its way

    # --- what an engine does ---

    @abstractmethod
    def _start(self, tasks: list[Task]) -> list[Task]:
        """Give the engine what it has room for; returns the rest."""

    @abstractmethod
    def _ended(self) -> dict[str, str | None]:
        """Tasks whose processes have ended and are not tried again -> None, or why they could not tell themselves."""

    @abstractmethod
    def _drop(self, task: Task) -> None:
        """Take a task back that no process has begun with."""

    @abstractmethod
    def _end(self) -> None:
        """End what is at work, and the engine's own processes here."""

    # --- what the study sees ---

    def submit(self, task: Task) -> None:
        if task.do == "plan":
            self._keys[task.id] = task.key
            self.planner.submit(task)
        else:
            self._waiting.append(task)

    def wait(self, timeout: float) -> list[Event]:
        until = time.monotonic() + timeout
        while True:
            if self._waiting and not self.planner.busy:  # what is asked for together goes together
                self._waiting = self._start(self._waiting)
            self.listen()
            self._news += [*self._planned(), *self._lost()]
            if self._news or time.monotonic() >= until:
                events, self._news = self._news, []
                return events
            time.sleep(max(_LOOK, _LOOK_EACH * len(self.meeting)))

    def verdict(self, id: str, go: bool) -> None:
        self.meeting.verdict(id, go)

    def stop(self) -> None:
        self._waiting.clear()
        self.planner.drop()
        self.listen()
        for id, task in self.tasks.items():
            if self.meeting.is_out(id) and not self.meeting.is_at_work(id):
                self._drop(task)
                self.meeting.forget(id)
        self.meeting.stop()

    def close(self) -> None:
        self.planner.close()
        self._end()

    # --- for the engines ---

    def listen(self) -> None:
        """Hear what the tasks have told by now."""
        self._news += self.meeting.hear()

    def place(self, task: Task, threads: int, by_hand: bool = False) -> Path:
        """The task's file, written. by_hand: see Meeting.place."""
        self.tasks[task.id] = task
        return self.meeting.place(task, self.request(task, threads), by_hand)

    def request(self, task: Task, threads: int) -> dict[str, Any]:
        """What a worker elsewhere reads: the run's folder by its whole path."""
        tree = task.request["tree"]
        return {**task.as_dict(), "threads": threads, "tree": {**tree, "out": str(Path(tree["out"]).absolute())}}

    def on_cuda(self, task: Task) -> bool:
        """Whether the task's plan is for a CUDA device."""
        return bool(self.devices.get(task.key, {}).get("type") == "cuda")

    def check_device(self, task: Task) -> None:
        """UserError where a job takes whatever device there is, and the one that was planned for is not there."""
        if self.other and task.request["tree"]["device"].get("type") == "auto" and not self.on_cuda(task):
            raise UserError(
                "device=auto: this machine has no CUDA device to plan for, and the jobs run on others; name what those "
                "have: device=cpu, a100-80gb, h100, …"
            )

    # --- within ---

    def _planned(self) -> list[Event]:
        events = self.planner.hear()
        for event in events:
            if event.kind == "planned" and (device := event.values.get("device")):
                self.devices[self._keys[event.id]] = device
        return events

    def _lost(self) -> list[Event]:
        """Tasks that ended without telling."""
        events = []
        for id, reason in self._ended().items():
            if reason is not None:
                events += self.meeting.lost(id, reason)
            else:
                self._over.setdefault(id, time.monotonic())
        for id, since in list(self._over.items()):
            if not self.meeting.is_out(id):
                del self._over[id]
            elif time.monotonic() - since > _LATE:
                del self._over[id]
                reason = f"the task ended, and its last event never came to {self.meeting.folder}"
                events += self.meeting.lost(id, reason)
        return events


class Shape(NamedTuple):
    """How a job is spread: over how many nodes, in how many processes on each."""

    nodes: int
    processes: int


def shape(task: Task) -> Shape:
    """The shape of a task's job."""
    tree = task.request["tree"]
    nodes = tree["nnodes"] or 1
    return Shape(nodes, tree["devices"] // nodes)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(text: str) -> None:
    """A line for the reader."""
    print(hide(text), file=sys.stderr, flush=True)
