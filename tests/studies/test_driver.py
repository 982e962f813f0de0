"""The driver with a launcher that tells at once: an interrupt in the midst of events, times of jobs found at work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ftrun.studies.driver import Driver
from ftrun.studies.launching import Event, Launcher, Task
from ftrun.studies.ledger import Ledger
from ftrun.studies.study import read_study
from tests.studies.replaying import search_of
from tests.studies.small import typed

PLAN = {"status": "finished", "fits": True, "needed_bytes": 1, "work": 6e12, "steps": 3}
DEVICE = {"name": "a card", "rate": 1e12, "usable_bytes": 10}


class Instant(Launcher):
    """Every task has ended when it is asked for; `before` is called as the end of one is handed over."""

    width = 1

    def __init__(self, before: Callable[[], None], **told: float) -> None:
        self._events: list[Event] = []
        self._before, self._told = before, told

    def submit(self, task: Task) -> None:
        if task.do == "plan":
            self._events.append(Event(task.id, "planned", {**PLAN, "device": DEVICE}))
            return
        self._events.append(Event(task.id, "began", {"steps": 0, "at": self._told.get("began")}))
        self._events.append(Event(task.id, "ended", {"status": "finished", "at": self._told.get("ended")}))

    def wait(self, timeout: float) -> list[Event]:
        event = self._events.pop(0) if self._events else None
        if event is not None and event.kind == "ended":
            self._before()
        return [event] if event is not None else []

    def verdict(self, id: str, go: bool) -> None: ...
    def stop(self) -> None:
        self._events.clear()

    def close(self) -> None: ...


def driver(tmp_path: Path, launcher: Instant) -> Driver:
    study = read_study(typed(tmp_path, "rank=2,4")[1:])
    return Driver(study, search_of(study), launcher, Ledger(study.folder / "ledger.jsonl"), lambda text: None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_as_a_job_ends_waits_for_nobody(tmp_path: Path, number: signal.Signals) -> None:
    made = driver(tmp_path, Instant(lambda: os.kill(os.getpid(), number)))
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert time.monotonic() - begun < 20
    (end,) = made.ledger.of("end")
    assert end["status"] == "finished"


def test_a_job_found_at_work_took_what_its_worker_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))
    made = driver(tmp_path, Instant(lambda: None, began=1000.0, ended=1042.0))
    made.run()
    assert [end["seconds"] for end in made.ledger.of("end")] == [42.0, 42.0]
    assert made.pace.seconds(PLAN) == pytest.approx(42)
