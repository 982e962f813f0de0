"""Studies that are killed, stopped, robbed of a worker: they go on, and no process outlives them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.studies.small import alive, descendants, events, ftrun, kill_all, started, typed, wait_for
from tests.studies.test_run import ends, table

_STABLE = ("rank", "layers", "status", "loss", "perplexity", "peak_bytes", "trainable_params", "steps")


def _begun(folder: Path, count: int) -> bool:
    return sum(e["event"] == "begin" for e in events(folder)) >= count


@pytest.mark.slow
def test_twelve_jobs_killed_three_times_end_as_if_they_never_were(tmp_path: Path) -> None:
    """SIGKILL to everything: as the first job trains, between two jobs, and as a later one trains."""
    axes = ("rank=1,2,3,4,6,8", "layers=all,first:1", "steps=2", "micro_batch=4", "checkpointing=none")
    whole = ftrun(typed(tmp_path, *axes, f"out={tmp_path / 'whole'}"))
    assert whole.returncode == 0, whole.stderr
    command, study = typed(tmp_path, *axes, f"out={tmp_path / 'killed'}"), tmp_path / "killed"
    moments = (lambda: _training(study, 1), lambda: len(ends(study)) >= 4, lambda: _training(study, 8))
    for kill, moment in enumerate(moments):
        process = started(command, tmp_path / "log")
        wait_for(moment)
        children = kill_all(process, alone=kill == 1)  # a worker dies with the one that asks, or with it in one blow
        assert children, "there was a worker"
        wait_for(lambda: not any(alive(p) for p in children), 30)  # noqa: B023
        assert len(ends(study)) < 12, "it was killed on the way"
    done = ftrun(command)
    assert done.returncode == 0, done.stderr
    keys = [e["key"] for e in ends(study)]
    assert len(keys) == len(set(keys)) == 12
    mine, theirs = ([{k: r[k] for k in _STABLE if k in r} for r in table(p)] for p in (study, tmp_path / "whole"))
    assert mine == theirs
    assert {r["status"] for r in mine} == {"finished"}


def _training(study: Path, count: int) -> bool:
    """The job of this number is at work, and has done a step."""
    begun, ended = ({e["key"] for e in events(study) if e["event"] == kind} for kind in ("begin", "end"))
    folders = {e["key"]: e["folder"] for e in events(study) if e["event"] == "trial"}
    files = [study / "runs" / folders[key] / "metrics.jsonl" for key in begun - ended]
    return len(begun) >= count and any(file.exists() and file.stat().st_size for file in files)


@pytest.mark.slow
def test_a_lost_worker_is_a_row_and_the_rest_goes_on(tmp_path: Path) -> None:
    study = tmp_path / "study"
    process = started(typed(tmp_path, "rank=2,4", "steps=6"), tmp_path / "log")
    wait_for(lambda: _begun(study, 1))
    (worker,) = [p for p in descendants(process.pid) if "tasks.worker" in _command(p)]
    os.kill(worker, signal.SIGKILL)
    assert process.wait(240) == 0, (tmp_path / "log").read_text()
    rows = table(study)
    lost = [r for r in rows if r["status"] == "failed"]
    assert len(lost) == 1
    assert "SIGKILL" in lost[0]["reason"]
    assert sum(r["status"] == "finished" for r in rows) == 1
    assert "1 of 2" in (tmp_path / "log").read_text()
    again = ftrun(typed(tmp_path, "rank=2,4", "steps=6"))  # what was lost is tried again
    assert again.returncode == 0, again.stderr
    assert [r["status"] for r in table(study)] == ["finished"] * 2


@pytest.mark.slow
def test_an_interrupt_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    study = tmp_path / "study"
    command = typed(tmp_path, "rank=2,4", "steps=400")
    process = started(command, tmp_path / "log")
    wait_for(lambda: list(study.glob("runs/*/metrics.jsonl")) and _steps(study) >= 5)
    children = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert "the same command goes on" in (tmp_path / "log").read_text()
    time.sleep(0.5)
    assert not any(alive(p) for p in children)
    (run,) = (study / "runs").iterdir()
    assert list((run / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_two_jobs_side_by_side_where_both_fit(tmp_path: Path) -> None:
    done = ftrun(typed(tmp_path, "rank=2,4", "steps=40", "launcher.workers=2"))
    assert done.returncode == 0, done.stderr
    kinds = [e["event"] for e in events(tmp_path / "study") if e["event"] in ("begin", "end")]
    assert kinds[:2] == ["begin", "begin"], kinds
    assert len(list((tmp_path / "study" / "workers").iterdir())) == 2


@pytest.mark.slow
def test_two_jobs_one_after_the_other_where_both_do_not_fit(tmp_path: Path) -> None:
    """A ceiling that one job fits under and two do not."""
    done = ftrun(typed(tmp_path, "rank=2,4", "steps=10", "launcher.workers=2", "device.memory=700MB"))
    assert done.returncode == 0, done.stderr
    kinds = [e["event"] for e in events(tmp_path / "study") if e["event"] in ("begin", "end")]
    assert kinds == ["begin", "end", "begin", "end"], kinds


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _steps(study: Path) -> int:
    return max((len(p.read_text().splitlines()) for p in study.glob("runs/*/metrics.jsonl")), default=0)
