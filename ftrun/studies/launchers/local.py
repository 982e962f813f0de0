"""Tasks on this machine, side by side as far as their planned peaks fit on the device together."""

from __future__ import annotations

import os
import selectors
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftrun.errors import UserError
from ftrun.schema import option
from ftrun.studies.elsewhere import cores
from ftrun.studies.launching import Event, Task
from ftrun.studies.launching import Launcher as Base
from ftrun.studies.worker import Worker

_AT_ONCE = 4  # jobs side by side on a GPU, where nobody says: beyond that they only wait for one another


@dataclass(frozen=True)
class Options:
    workers: int | str = option(
        "auto", "jobs side by side on a device", ge=1, pattern="auto", form="auto, or a number of jobs as 2"
    )
    devices: int = option(1, "GPUs to spread the jobs over", ge=1)


@dataclass
class Seat:
    """A worker's place: which device it has, and what it is at."""

    device: int
    worker: Worker
    task: Task | None = None
    begun: bool = False  # whether the task has
    base: str = ""  # whose weights it holds
    held: int = 0  # bytes that it may hold on to when it is idle
    planned: set[str] = field(default_factory=set)  # keys of jobs whose plans it holds


class Launcher(Base):
    """Workers are started when they are needed, and again when one is lost. Their prints go to workers/N.log."""

    def __init__(self, options: Options, folder: Path) -> None:
        super().__init__(options, folder)
        self._seats: list[Seat] = []
        self._waiting: list[Task] = []
        self._selector = selectors.DefaultSelector()
        self._device: Mapping[str, Any] | None = None  # as the first plan found it
        self._started = 0
        self._again: set[str] = set()  # tasks that were begun anew

    @property
    def width(self) -> int:
        if self._device is None:
            return 1
        return self._per_device() * self.options.devices

    def submit(self, task: Task) -> None:
        mine, theirs = self.options.devices, task.request["tree"]["devices"]
        if min(mine, theirs) > 1:
            raise UserError(
                f"launcher.devices={mine}: each job gets one of them, and here is one of devices={theirs}; leave the "
                "launcher's at 1, where every job sees them all"
            )
        self._waiting.append(task)
        self._start()

    def wait(self, timeout: float) -> list[Event]:
        self._start()
        events: list[Event] = []
        for key, _ in self._selector.select(timeout):
            events += self._hear(key.data)
        return events

    def verdict(self, id: str, go: bool) -> None:
        for seat in self._seats:
            if seat.task is not None and seat.task.id == id:
                seat.worker.send({"do": "verdict", "id": id, "go": go})

    def stop(self) -> None:
        self._waiting.clear()
        for seat in self._seats:
            if seat.task is not None:
                seat.worker.send({"do": "stop"})

    def close(self) -> None:
        for seat in self._seats:
            if seat.task is None:
                seat.worker.end()
            else:
                seat.worker.kill()
        self._seats.clear()
        self._selector.close()

    def _hear(self, seat: Seat) -> list[Event]:
        replies = seat.worker.receive()
        if replies is None:
            return self._lost(seat)
        events = []
        for reply in replies:
            seat.begun = seat.begun or reply["event"] == "began"
            if reply["event"] in ("planned", "ended"):
                self._note(seat, reply)
            events.append(Event(reply["id"], reply["event"], reply))
        return events

    def _note(self, seat: Seat, reply: Mapping[str, Any]) -> None:
        assert seat.task is not None
        if reply["event"] == "planned":
            seat.planned.add(seat.task.key)
            self._device = self._device or self._checked(reply.get("device"))
        seat.task = None

    def _checked(self, device: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """UserError where there are not as many devices as are asked for."""
        if device and self.options.devices > device.get("count", 1):
            there = f"{device['count']} of {device['name']}" if device["type"] == "cuda" else "no GPU"
            raise UserError(f"launcher.devices={self.options.devices}: this machine has {there}")
        return device

    def _lost(self, seat: Seat) -> list[Event]:
        self._selector.unregister(seat.worker)
        self._seats.remove(seat)
        if seat.task is None:
            return []
        if not seat.begun and seat.task.id not in self._again:  # it died before it could begin: of something else
            self._again.add(seat.task.id)
            self._waiting.insert(0, seat.task)
            return []
        return [Event(seat.task.id, "ended", {"status": "failed", "reason": seat.worker.epitaph()})]

    def _start(self) -> None:
        """Tasks to idle workers, the first that fits first; a new worker where there is none and room for one."""
        for task in list(self._waiting):
            device = self._room(task)
            if device is None:
                continue
            seat = self._idle(task, device) or self._new(device)
            if seat is None:
                continue
            self._waiting.remove(task)
            self._make_room(task, seat)
            seat.begun = False
            seat.task, seat.base, seat.held = task, task.base or seat.base, max(seat.held, task.bytes)
            # what was free before anything ran: what its neighbours take is not for a job to judge
            here = {"threads": max(1, cores() // self._per_device()), "device": self._device}
            seat.worker.send({**task.as_dict(), **here})

    def _room(self, task: Task) -> int | None:
        """The device that has room for the task; one on which nothing runs has room for anything."""
        for device in range(self.options.devices if self._device is not None else 1):
            at_work = [s.task for s in self._seats if s.device == device and s.task is not None]
            taken = sum(t.bytes for t in at_work)
            usable = (self._device or {}).get("usable_bytes", 0)
            if len(at_work) < self._per_device() and (not at_work or taken + task.bytes <= usable):
                return device
        return None

    def _make_room(self, task: Task, seat: Seat) -> None:
        """Let idle workers go whose weights are in the way."""
        others = [s for s in self._seats if s.device == seat.device and s is not seat]
        taken = sum(s.task.bytes if s.task is not None else s.held for s in others)
        if task.bytes and taken + task.bytes > (self._device or {}).get("usable_bytes", 0):
            for other in [s for s in others if s.task is None]:
                self._selector.unregister(other.worker)
                self._seats.remove(other)
                other.worker.end()

    def _idle(self, task: Task, device: int) -> Seat | None:
        """The idle worker that has most of what the task needs."""
        free = [s for s in self._seats if s.device == device and s.task is None]
        return max(free, key=lambda s: (task.key in s.planned, task.base == s.base), default=None)

    def _new(self, device: int) -> Seat | None:
        if sum(s.device == device for s in self._seats) >= self._per_device():
            return None
        self._started += 1
        made = Seat(device, Worker(self.folder / "workers" / f"{self._started}.log", self._environment(device)))
        self._seats.append(made)
        self._selector.register(made.worker, selectors.EVENT_READ, made)
        return made

    def _per_device(self) -> int:
        if isinstance(self.options.workers, int):
            return self.options.workers
        if self._device is None:
            return 1
        return _AT_ONCE if self._device["type"] == "cuda" else max(1, cores() // 2)

    def _environment(self, device: int) -> dict[str, str]:
        """Each worker its GPU, where there are several; the first one's see all of them, and so how many there are."""
        if device == 0:
            return {}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(n) for n in range(self.options.devices)]
        return {"CUDA_VISIBLE_DEVICES": names[device]}
