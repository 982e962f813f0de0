"""How a worker hears requests and tells what became of them: over two pipes, or through files of a shared folder."""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ftrun.beside import replace_text

_PDEATHSIG = 1  # Linux's prctl: the signal that comes when the parent dies
_LOOK = 0.1  # seconds between two looks at a file
_PATIENCE = 600.0  # seconds that a verdict is waited for; without one, the task goes on


class Channel(Protocol):
    """One end of the conversation, as a context."""

    def __enter__(self) -> Any: ...
    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def requests(self) -> Iterator[dict[str, Any]]:
        """The tasks, one after the other."""

    def send(self, reply: Mapping[str, Any]) -> None:
        """Tell."""

    def verdict(self, name: str) -> bool:
        """Wait for the answer to a rung."""

    def stopped(self) -> bool:
        """Whether all tasks are to save what they have and end."""


class OnPipes:
    """Standard input and output. What the task prints goes to standard error; the end of the input ends the process."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._tasks: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._verdicts: queue.Queue[bool] = queue.Queue()
        self._stopped = threading.Event()
        self._busy = threading.Event()

    def __enter__(self) -> OnPipes:
        die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asks decides
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._out.close()

    def requests(self) -> Iterator[dict[str, Any]]:
        while (task := self._tasks.get()) is not None:
            self._busy.set()
            yield task
            self._busy.clear()

    def send(self, reply: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(reply, default=str) + "\n")
        self._out.flush()

    def verdict(self, name: str) -> bool:
        return self._verdicts.get()

    def stopped(self) -> bool:
        return self._stopped.is_set()

    def _listen(self) -> None:
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "verdict":
                self._verdicts.put(bool(request["go"]))
            elif request["do"] == "stop":
                self._stopped.set()
                self._verdicts.put(True)  # one that waits is not to wait for ever
            else:
                self._tasks.put(request)
        if self._busy.is_set():
            os._exit(1)  # whoever asked is gone: nobody wants the rest
        self._tasks.put(None)


class InFiles:
    """TASK.json, TASK.events.jsonl, TASK.verdict and TASK.stop, all in one folder."""

    def __init__(self, task: Path) -> None:
        self._task = task
        self._events = task.with_suffix(".events.jsonl")
        self._asked = 0

    def __enter__(self) -> InFiles:
        if os.environ.get("FTRUN_PARENT"):
            die_with_parent()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing is open."""

    def requests(self) -> Iterator[dict[str, Any]]:
        yield json.loads(self._task.read_text(encoding="utf-8"))

    def send(self, reply: Mapping[str, Any]) -> None:
        with self._events.open("ab") as file:
            file.write(json.dumps(reply, default=str).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def verdict(self, name: str) -> bool:
        """The file holds {"answers": [true, …]}: one for each rung of this attempt, in order."""
        self._asked += 1
        path, until = self._task.with_suffix(".verdict"), time.monotonic() + _PATIENCE
        while time.monotonic() < until and not self.stopped():
            answers = read_answers(path)
            if len(answers) >= self._asked:
                return answers[self._asked - 1]
            time.sleep(_LOOK)
        return True

    def stopped(self) -> bool:
        return self._task.with_suffix(".stop").exists()


def read_answers(path: Path) -> list[bool]:
    """The verdicts in a file, [] where there is none yet."""
    try:
        return [bool(one) for one in json.loads(path.read_text(encoding="utf-8"))["answers"]]
    except (OSError, ValueError, KeyError):
        return []


def write_answer(path: Path, go: bool) -> None:
    """One more verdict, the file whole at every instant."""
    replace_text(path, json.dumps({"answers": [*read_answers(path), go]}))


def die_with_parent() -> None:
    """From now on this process is killed when its parent dies, however that happens. Linux; elsewhere nothing."""
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):
        return
    if os.getppid() != parent or parent == 1:
        os._exit(1)  # it died before it could be asked
