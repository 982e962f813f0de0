"""Both ends of a shared folder: a study's Meeting and a worker's InFiles, attempts that are lost between them."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ftrun.dialogue import add_line, read_lines
from ftrun.studies.attempt import Attempt, AttemptLost
from ftrun.studies.launching import Task
from ftrun.studies.meeting import Meeting
from ftrun.tasks.channel import InFiles
from tests.jobs import tiny_job


def task(id: str = "0", until: int | None = None, **tree: Any) -> Task:
    request = {"choices": {}, "tree": {"out": "/runs/rank2", **tree}, "until": until, "rungs": [2], "asks": True}
    return Task(id, "train", "abc", request)


def placed(meeting: Meeting, one: Task) -> Path:
    return meeting.place(one, one.as_dict())


def begun(path: Path) -> InFiles:
    """A worker that has read its task."""
    worker = InFiles(path)
    assert next(iter(worker.requests()))["do"] == "train"
    worker.send({"event": "began", "id": "0"})
    return worker


def kinds(meeting: Meeting) -> list[str]:
    return [event.kind for event in meeting.hear()]


def test_a_task_its_rungs_and_its_end(tmp_path: Path) -> None:
    meeting = Meeting(tmp_path)
    worker = begun(placed(meeting, task()))
    assert kinds(meeting) == ["began"]
    for step, go in ((2, True), (4, False)):
        worker.send({"event": "rung", "id": "0", "step": step, "loss": 1.5})
        (rung,) = meeting.hear()
        assert (rung.id, rung.kind, rung.values["step"], rung.values["loss"]) == ("0", "rung", step, 1.5)
        meeting.verdict("0", go)
        assert worker.verdict("0") is go
    worker.send({"event": "ended", "id": "0", "status": "pruned", "reason": None})
    assert kinds(meeting) == ["ended"]
    assert not meeting.is_out("0")
    assert kinds(meeting) == []


def test_an_attempt_after_a_lost_one_is_answered_as_the_first_was(tmp_path: Path) -> None:
    said: list[str] = []
    meeting = Meeting(tmp_path, said.append)
    path = placed(meeting, task())
    first = begun(path)
    for step in (2, 4):
        first.send({"event": "rung", "id": "0", "step": step, "loss": 1.5})
    assert kinds(meeting) == ["began", "rung", "rung"]
    meeting.verdict("0", True)
    with path.with_suffix(".events.jsonl").open("ab") as file:
        file.write(b'{"event": "ended", "stat')  # killed while it wrote
    second = begun(path)
    second.send({"event": "rung", "id": "0", "step": 2, "loss": 1.5})
    assert kinds(meeting) == ["began"]  # the search has judged this step already
    assert second.verdict("0") is True
    second.send({"event": "rung", "id": "0", "step": 4, "loss": 1.5})
    assert kinds(meeting) == ["rung"]
    meeting.verdict("0", True)  # of the lost attempt's rung
    meeting.verdict("0", False)
    assert second.verdict("0") is False
    assert said == [f"rank2: attempt 2, on {socket.gethostname()}"]
    gone = {"status": "failed", "reason": "gone (in attempt 2)"}
    assert meeting.lost("0", "gone")[-1].values == gone
    assert meeting.lost("0", "gone") == []


def test_a_task_holds_what_its_job_needs_for_its_user_alone_and_what_it_tells_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret123456")
    path = placed(Meeting(tmp_path), task(prompt="secret123456"))
    assert "secret123456" in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    begun(path).send({"event": "ended", "id": "0", "status": "invalid", "reason": "prompt=secret123456: no"})
    (*_, end) = read_lines(path.with_suffix(".events.jsonl"))[0]
    assert end["reason"] == "prompt=***: no"


def test_what_others_stop_is_no_end_and_what_we_stop_is(tmp_path: Path) -> None:
    meeting = Meeting(tmp_path)
    worker = begun(placed(meeting, task()))
    worker.send({"event": "ended", "id": "0", "status": "stopped", "reason": "SIGTERM"})
    assert kinds(meeting) == ["began"]
    assert meeting.is_out("0")
    assert not worker.stopped()
    meeting.stop()
    assert worker.stopped()
    again = begun(meeting.path("0"))
    again.send({"event": "ended", "id": "0", "status": "stopped", "reason": "asked"})
    assert kinds(meeting) == ["began", "ended"]


def test_a_study_that_is_started_again_hears_everything_of_the_same_task(tmp_path: Path) -> None:
    before = Meeting(tmp_path)
    path = placed(before, task())
    worker = begun(path)
    worker.send({"event": "rung", "id": "0", "step": 2, "loss": 1.5})
    before.hear()
    before.verdict("0", True)
    worker.send({"event": "rung", "id": "0", "step": 4, "loss": 1.4})
    del before

    other, same = task("7", seed=1), task("7")
    after = Meeting(tmp_path)
    assert after.adopt(other, other.as_dict()) is None
    assert after.adopt(same, same.as_dict()) == path
    assert [(e.id, e.kind, e.values.get("step")) for e in after.hear()] == [("7", "began", None), ("7", "rung", 4)]
    after.verdict("7", False)
    assert (worker.verdict("0"), worker.verdict("0")) == (True, False)


def test_a_task_placed_again_begins_anew(tmp_path: Path) -> None:
    meeting = Meeting(tmp_path)
    path = placed(meeting, task())
    begun(path).send({"event": "ended", "id": "0", "status": "failed", "reason": "a fault"})
    meeting.stop()
    assert kinds(meeting) == ["began", "ended"]
    assert placed(meeting, task()) == path
    assert kinds(meeting) == []
    assert not InFiles(path).stopped()
    assert placed(meeting, task("1")) != path  # the same job twice at once
    assert placed(meeting, task("2", until=20)).name == "train-abc-20.json"
    assert json.loads(path.read_text())["id"] == "0"


@pytest.mark.parametrize("torn", [b"", b'{"a"', b"\xff\xfe", b"[1]\n", b"\n"])
def test_lines_after_a_torn_one_are_whole(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    add_line(path, {"n": 1})
    with path.open("ab") as file:
        file.write(torn)
    first, read = read_lines(path)
    assert first == [{"n": 1}]
    add_line(path, {"n": 2})
    assert read_lines(path, read)[0] == [{"n": 2}]
    assert read_lines(path)[0] == [{"n": 1}, {"n": 2}]


@pytest.mark.slow
def test_a_real_worker_asks_at_its_rungs_and_goes_on_where_it_was_left(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "method=lora", "rank=2", "steps=8", "eval.max_new_tokens=0", "save_every=null")
    meeting = Meeting(tmp_path / "tasks")
    heard: list[tuple[Any, ...]] = []

    def done(until: int | None, verdicts: dict[int, bool]) -> None:
        request = {"choices": job.choices, "tree": dict(job.tree), "until": until, "rungs": [2, 4], "asks": True}
        path = placed(meeting, Task("0", "train", "abc", request))
        process = threading.Thread(target=Attempt(str(path), os.getcwd(), log=str(path.with_suffix(".log"))))
        process.start()
        while meeting.is_out("0"):
            for event in meeting.hear():
                heard.append((event.kind, event.values.get("step"), event.values.get("status")))
                if event.kind == "rung":
                    meeting.verdict("0", verdicts[event.values["step"]])
            time.sleep(0.05)
        process.join()

    done(3, {2: True})
    assert heard == [("began", None, None), ("rung", 2, None), ("ended", None, "paused")]
    heard.clear()
    done(None, {4: False})
    assert heard == [("began", None, None), ("rung", 4, None), ("ended", None, "pruned")]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_an_attempt_that_cannot_see_the_folder_says_where(tmp_path: Path) -> None:
    with pytest.raises(AttemptLost, match=f"{socket.gethostname()} does not see {tmp_path}/none.json"):
        Attempt(str(tmp_path / "none.json"), str(tmp_path))()
