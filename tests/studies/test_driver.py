"""The driver with a launcher that tells at once: an interrupt in the midst of events, times of jobs found at work."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import pytest

from ftrun.cli import main
from ftrun.studies import run
from ftrun.studies.driver import Driver
from ftrun.studies.launching import Event, Launcher, Task
from ftrun.studies.ledger import Ledger
from ftrun.studies.rows import rows_of
from ftrun.studies.study import read_study, record
from tests.studies.replaying import search_of
from tests.studies.small import typed

PLAN = {"status": "finished", "fits": True, "needed_bytes": 1, "work": 6e12, "steps": 3}
DEVICE = {"name": "a card", "rate": 1e12, "usable_bytes": 10}


class Instant(Launcher):
    """Every task has ended when it is asked for; `before` is called as the end of one is handed over."""

    width = 1

    def __init__(self, before: Callable[[], None], **told: Any) -> None:
        self._events: list[Event] = []
        self.trained: list[Task] = []
        self._before, self._told = before, told

    def submit(self, task: Task) -> None:
        if task.do == "plan":
            trained = {"trainable_params": 1000 * task.request["tree"]["method"]["rank"]}
            self._events.append(Event(task.id, "planned", {**PLAN, **trained, "device": DEVICE}))
            return
        self.trained.append(task)
        self._events.append(Event(task.id, "began", {"steps": 0, "at": self._told.get("began")}))
        end = {"status": "finished", "reason": None, **self._told, "at": self._told.get("ended")}
        self._events.append(Event(task.id, "ended", end))

    def wait(self, timeout: float) -> list[Event]:
        event = self._events.pop(0) if self._events else None
        if event is not None and event.kind == "ended":
            self._before()
        return [event] if event is not None else []

    def verdict(self, id: str, go: bool) -> None: ...
    def stop(self) -> None:
        self._events.clear()

    def close(self) -> None: ...


def driver(tmp_path: Path, launcher: Instant, *more: str) -> Driver:
    study = read_study(typed(tmp_path, *(more or ("rank=2,4",)))[1:])
    record(study)
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


def test_table_and_page_go_by_what_the_search_aims_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No run has a held-out loss; the page that `ftrun report` makes again is the very same, the search's words too."""
    aims = ("rank=8,2,4", "trials=3", "search.sampler=bruteforce", "search=optuna")
    made = driver(tmp_path, Instant(lambda: None), *aims, "search.objectives=[trainable_params]")
    made.run()
    rows = run._report(made)
    assert run._show(made, rows) == 0
    said = capsys.readouterr().out
    assert "Best: rank=2, trained parameters 2,000" in said
    best = next(row["number"] for row in rows if row["values"] == {"rank": "2"})
    words = f"The best trainable_params of 3 trials is row {best}'s (rank=2): 2000"
    assert words in said
    page = (tmp_path / "study" / "report.html").read_bytes()
    assert escape(words).encode() in page

    assert main(["report", str(tmp_path / "study"), "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["by"], found["summary"][-1]) == ("trainable_params", words)
    assert [row["values"]["rank"] for row in found["rows"]] == ["2", "4", "8"]
    assert (tmp_path / "study" / "report.html").read_bytes() == page

    made.ledger.add("end", number=9, key="later", status="failed")  # what was found is no longer of what is there
    assert main(["report", str(tmp_path / "study"), "format=json"]) == 0
    assert words not in json.loads(capsys.readouterr().out)["summary"]


def test_a_secret_is_in_no_file_of_a_study_and_not_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a value that is swept, as one that all jobs share, and as the reason of an end."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET := "secret123456")
    swept = ("search=optuna", "trials=2", "search.sampler=bruteforce", f"targets={SECRET},all")
    command = (*swept, f"eval.prompt={SECRET}")
    made = driver(tmp_path, Instant(lambda: None, reason=f"as {SECRET} has it"), *command)
    made.say = run._say
    made.run()
    run._show(made, run._report(made))
    made.ledger.close()
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    assert "***" in said.out
    study = tmp_path / "study"
    assert not [
        path for path in study.rglob("*") if SECRET in str(path) or (path.is_file() and SECRET in path.read_text())
    ]
    for name in ("study.yaml", "ledger.jsonl", "table.csv", "report.html"):
        assert "***" in (study / name).read_text(), name
    again = driver(tmp_path, Instant(lambda: None), *command)  # the same study all the same
    assert again._again == []


def test_equal_points_of_a_job_that_fails_run_once_and_again_when_the_study_goes_on(tmp_path: Path) -> None:
    equal = ("method=lora,qlora", "quant=nf4", "optim=adamw", "checkpointing=none", "kernels=fast,reference", "rank=4")
    for life in (1, 2):
        made = driver(tmp_path, Instant(lambda: None, status="failed", reason="lost"), *equal)
        made.run()
        ends = [end["status"] for end in made.ledger.of("end")]
        assert ends == ["failed"] * 2 * life
    rows = rows_of(made.ledger.events, made.study.folder)
    assert sorted(row["status"] for row in rows) == ["failed", "failed", "same", "same"]


def test_a_record_that_cannot_be_written_lets_jobs_save_what_they_have(tmp_path: Path) -> None:
    made = driver(tmp_path, Instant(lambda: None))
    asked: list[str] = []
    made.say, made.launcher.stop = asked.append, lambda: asked.append("stop")  # type: ignore[method-assign]
    os.dup2(os.open("/dev/full", os.O_WRONLY), made.ledger._file.fileno())
    with pytest.raises(OSError, match="No space left"):
        made.run()
    assert asked[1] == "stop"


def test_a_job_needs_what_all_of_its_ranks_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLAN, "ranks", 2)
    made = driver(tmp_path, Instant(lambda: None))
    made.run()
    assert [(task.bytes, task.share) for task in made.launcher.trained] == [(2, 0.2)] * 2  # type: ignore[attr-defined]
