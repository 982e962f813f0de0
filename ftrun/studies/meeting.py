"""Where a study and its workers elsewhere meet: its folder's `tasks`, one end of what ftrun/dialogue.py describes.

The other end is InFiles of ftrun/tasks/channel.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftrun.beside import replace_text
from ftrun.dialogue import add_line, is_end, read_lines
from ftrun.runs import read_json
from ftrun.studies.launching import Event, Task

_BESIDE = (".events.jsonl", ".verdict", ".stop")
# what may differ between a request and the same one of an earlier study's life
_FREE = ("id", "threads")


@dataclass
class Watched:
    """A task that is out. run: what its run's folder is called. answers: by step, so that an attempt which comes to a
    rung again is answered alike.
    """

    id: str
    path: Path
    run: str
    read: int = 0  # bytes of its events that were heard
    attempt: int = 0
    at_work: bool = False
    stopped: bool = False
    answers: dict[int, bool] = field(default_factory=dict)
    answered: set[tuple[int, int]] = field(default_factory=set)  # (attempt, step)
    asked: list[tuple[int, int]] = field(default_factory=list)  # (attempt, step) of rungs that wait for a verdict


class Meeting:
    """The tasks of a study that are out, by their ids."""

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
        """folder: where the files lie; made when the first task is placed. say: hears of attempts after the first."""
        self.folder, self._say = folder, say
        self._watched: dict[str, Watched] = {}

    def file(self, task: Task) -> Path:
        """The task's file: the same for the same task, whatever its number is this time."""
        until = task.request.get("until")
        name = f"{task.do}-{task.key}" + ("" if until is None else f"-{until}")
        taken, path, count = {w.path for w in self._watched.values()}, self.folder / f"{name}.json", 1
        while path in taken:
            count += 1
            path = self.folder / f"{name}-again{count}.json"
        return path

    def place(self, task: Task, request: Mapping[str, Any], by_hand: bool = False) -> Path:
        """Write a task's file, nothing left of an earlier one; returns it. Its events are heard from now on.

        by_hand: its user may have begun with the same task, whose events then stay.
        """
        path = self.file(task)
        for suffix in (".stop",) if by_hand and self._is_there(path, request) else _BESIDE:
            path.with_suffix(suffix).unlink(missing_ok=True)
        replace_text(path, json.dumps(request, default=str), private=True)  # what secrets the job holds are in it
        # there from the start: a name that a network's file system has once missed is missed for a while
        path.with_suffix(".verdict").touch()
        self._watched[task.id] = Watched(task.id, path, Path(request["tree"]["out"]).name)
        return path

    def adopt(self, task: Task, request: Mapping[str, Any]) -> Path | None:
        """The file of the same task from an earlier life of the study, heard from its first event on; None if none."""
        path = self.file(task)
        if not self._is_there(path, request):
            return None
        path.with_suffix(".stop").unlink(missing_ok=True)
        one = self._watched[task.id] = Watched(task.id, path, Path(request["tree"]["out"]).name)
        for line in read_lines(path.with_suffix(".verdict"))[0]:
            if line.keys() >= {"attempt", "step", "go"}:
                one.answers[line["step"]] = line["go"]
                one.answered.add((line["attempt"], line["step"]))
        return path

    def hear(self) -> list[Event]:
        """What has been told since the last time."""
        return [event for one in list(self._watched.values()) for event in self._news(one)]

    def verdict(self, id: str, go: bool) -> None:
        """The answer to a task's oldest rung that has none."""
        one = self._watched.get(id)
        if one is not None and one.asked:
            self._answer(one, *one.asked.pop(0), go)

    def stop(self) -> None:
        """Ask every task that is out to save a checkpoint and end."""
        for one in self._watched.values():
            one.stopped = True
            one.path.with_suffix(".stop").touch()

    def forget(self, id: str) -> None:
        """A task that will not be done after all."""
        self._watched.pop(id, None)

    def lost(self, id: str, reason: str) -> list[Event]:
        """A task whose process ended and is not tried again: what it told last, or that it was lost."""
        one = self._watched.get(id)
        events = [] if one is None else self._news(one)
        if one is not None and id in self._watched:
            status, reason = "stopped" if one.stopped else "failed", f"{reason}{_often(one.attempt)}"
            events.append(Event(id, "ended", {"status": status, "reason": reason}))
            self.forget(id)
        return events

    def is_out(self, id: str) -> bool:
        """Whether a task has not ended yet."""
        return id in self._watched

    def is_at_work(self, id: str) -> bool:
        """Whether a process has begun with a task."""
        return id in self._watched and self._watched[id].at_work

    def path(self, id: str) -> Path:
        """The file of a task that is out."""
        return self._watched[id].path

    def run(self, id: str) -> str:
        """The name of its run's folder."""
        return self._watched[id].run

    def __len__(self) -> int:
        return len(self._watched)

    def _is_there(self, path: Path, request: Mapping[str, Any]) -> bool:
        """Whether a file asks for the same."""
        there = read_json(path)
        return there is not None and _same(there) == _same(json.loads(json.dumps(request, default=str)))

    def _news(self, one: Watched) -> list[Event]:
        lines, one.read = read_lines(one.path.with_suffix(".events.jsonl"), one.read)
        return [event for line in lines if one.id in self._watched for event in self._heard(one, line)]

    def _heard(self, one: Watched, told: Mapping[str, Any]) -> list[Event]:
        kind = told.get("event")
        if kind == "attempt":
            one.attempt, one.at_work = int(told["number"]), True
            if one.attempt > 1:
                self._say(f"{one.run}: attempt {one.attempt}, on {told.get('host')}")
            return []
        if kind == "rung" and not self._is_new(one, int(told["step"])):
            return []
        if kind == "ended":
            one.at_work = False
            if not is_end(told, one.stopped):
                return []
            self.forget(one.id)
        return [Event(one.id, str(kind), {**told, "id": one.id})]

    def _is_new(self, one: Watched, step: int) -> bool:
        """Whether a rung waits for a verdict of the search; one that it has judged before is answered here."""
        at = (one.attempt, step)
        if at in one.answered:
            return False
        if step in one.answers:
            self._answer(one, *at, one.answers[step])
            return False
        one.asked.append(at)
        return True

    def _answer(self, one: Watched, attempt: int, step: int, go: bool) -> None:
        one.answers[step] = go
        one.answered.add((attempt, step))
        add_line(one.path.with_suffix(".verdict"), {"attempt": attempt, "step": step, "go": go})


def _often(attempts: int) -> str:
    return f" (in attempt {attempts})" if attempts > 1 else ""


def _same(request: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in request.items() if key not in _FREE}
