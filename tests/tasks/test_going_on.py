"""What an interrupted, failed or finished run leaves, and what the next command makes of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ftrun.errors import Interrupted, UserError
from ftrun.lock import Lock
from ftrun.tasks import session
from ftrun.tasks import train as task
from ftrun.train import checkpoint, interrupt, loop
from ftrun.train.interrupt import terminable
from tests.jobs import tiny_job, write_rows
from tests.tasks.instants import LORA, adapter, after_step, at_evaluation, kill, read, steps_in


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_the_last_evaluation_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    task.run(tiny_job(tmp_path, *LORA, "steps=3", f"out={tmp_path}/whole"))
    job, run = tiny_job(tmp_path, *LORA, "steps=3"), tmp_path / "run"
    at_evaluation(monkeypatch, 3, kill(number))
    with terminable(), pytest.raises(Interrupted, match="only evaluates and hands over"):
        task.run(job)
    monkeypatch.undo()
    result = read(run / "result.json")
    assert (result["status"], result["steps"]) == ("interrupted", 3)
    trained: list[int] = []
    after_step(monkeypatch, 3, lambda: trained.append(3))
    assert task.run(job) == 0
    assert trained == []
    assert adapter(run) == adapter(tmp_path / "whole")
    assert steps_in(run / "metrics.jsonl") == [1, 2, 3]
    assert steps_in(run / "evals.jsonl") == [0, 3]
    assert read(run / "result.json")["eval"] == read(tmp_path / "whole/result.json")["eval"] | {}


def hang() -> None:
    kill(signal.SIGTERM)()
    time.sleep(60)


def in_a_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Between two micro-batches of a step, or in the first."""
    own, passes = loop.accumulate, 0

    def accumulate(work: Any, batches: Any, supervised: Any = None) -> Any:
        inner = work.loss

        def loss(batch: Any) -> Any:
            nonlocal passes
            passes += 1
            found = inner(batch)
            if passes == 2 * step:
                act()
            return found

        work.loss = loss
        try:
            return own(work, batches, supervised)
        finally:
            work.loss = inner

    monkeypatch.setattr(loop, "accumulate", accumulate)


@pytest.mark.parametrize("where", [in_a_step, at_evaluation])
def test_a_step_or_an_evaluation_that_takes_too_long_is_left_and_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Callable[..., None]
) -> None:
    words = (*LORA, "dropout=0.1", "steps=4", "eval.every=2", "eval.keep_best=true", "batch=8", "micro_batch=4")
    task.run(tiny_job(tmp_path, *words, f"out={tmp_path}/whole"))
    job, run = tiny_job(tmp_path, *words), tmp_path / "run"
    monkeypatch.setattr(interrupt, "GRACE", 0.2)
    where(monkeypatch, 3 if where is in_a_step else 2, hang)
    with terminable(), pytest.raises(Interrupted, match="after step 2 of 4; a checkpoint is saved"):
        task.run(job)
    monkeypatch.undo()
    saved = checkpoint.load(run / "checkpoints/step-2").progress
    assert saved.unevaluated == (where is at_evaluation)
    assert task.run(job) == 0
    assert adapter(run) == adapter(tmp_path / "whole")
    assert steps_in(run / "metrics.jsonl") == [1, 2, 3, 4]
    timeless = [
        [{**r, "seconds": 0} for r in map(json.loads, (out / "evals.jsonl").read_text().splitlines())]
        for out in (run, tmp_path / "whole")
    ]
    assert timeless[0] == timeless[1]


def test_a_first_step_that_takes_too_long_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "GRACE", 0.2)
    in_a_step(monkeypatch, 1, hang)
    job = tiny_job(tmp_path, *LORA, "steps=3", "batch=8", "micro_batch=4", "eval=none", f"out={tmp_path}/runs/a")
    with pytest.raises(Interrupted, match="before the first step"):
        task.run(job)
    assert not (tmp_path / "runs").exists()


def test_a_stop_before_the_first_step_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_evaluation(monkeypatch, 0, kill(signal.SIGTERM))
    # eval.rows is new to the cache of the base's figures
    with terminable(), pytest.raises(Interrupted, match="before the first step") as stopped:
        task.run(tiny_job(tmp_path, *LORA, "steps=3", "eval.rows=3", f"out={tmp_path}/runs/a"))
    assert stopped.value.exit_code == 130
    assert not (tmp_path / "runs").exists()


def test_an_interruption_saves_a_checkpoint_where_none_is_ever_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step(monkeypatch, 2, kill(signal.SIGINT))
    with pytest.raises(Interrupted, match="a checkpoint is saved"):
        task.run(tiny_job(tmp_path, *LORA, "steps=4", "save_every=null"))
    assert checkpoint.load(tmp_path / "run/checkpoints/step-2").progress.step == 2


def test_steps_raised_go_on_and_steps_lowered_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    constant = (*LORA, "optim.schedule=constant", "optim.warmup=0")
    task.run(tiny_job(tmp_path, *constant, "steps=5", f"out={tmp_path}/whole"))
    task.run(tiny_job(tmp_path, *constant, "steps=2"))
    assert task.run(tiny_job(tmp_path, *constant, "steps=5")) == 0
    assert adapter(run) == adapter(tmp_path / "whole")
    assert steps_in(run / "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert steps_in(run / "evals.jsonl") == [0, 2, 5]
    with pytest.raises(UserError, match="5 steps are done there, and this job has 4"):
        task.run(tiny_job(tmp_path, *constant, "steps=4"))
    capsys.readouterr()
    # the same number, said in other words: 36 rows in batches of 4 are 9 steps
    assert task.run(tiny_job(tmp_path, *constant, "epochs=0.5")) == 0
    assert "Nothing to do" in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints")
    before = (run / "result.json").read_bytes()
    with pytest.raises(UserError, match="its checkpoints are gone"):
        task.run(tiny_job(tmp_path, *constant, "steps=6"))
    assert (run / "result.json").read_bytes() == before
    assert task.run(tiny_job(tmp_path, *constant, "steps=5")) == 0


def test_a_forced_change_of_a_finished_run_is_recorded(tmp_path: Path) -> None:
    task.run(tiny_job(tmp_path, *LORA, "steps=2"))
    changed = (*LORA[:2], "lr=5e-3")
    with pytest.raises(UserError, match=r"lr: 0\.01 there, 0\.005 now"):
        task.run(tiny_job(tmp_path, *changed, "steps=2"))
    assert task.run(tiny_job(tmp_path, *changed, "steps=2", "resume=force")) == 0
    assert "lr: 0.005" in (tmp_path / "run/job.yaml").read_text()
    assert read(tmp_path / "run/result.json")["status"] == "finished"


@pytest.mark.parametrize("what", ["base", "data"])
def test_a_base_or_rows_that_changed_in_place_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    job = tiny_job(tmp_path, *LORA, "steps=3")
    after_step(monkeypatch, 1, kill(signal.SIGINT))
    with pytest.raises(Interrupted):
        task.run(job)
    monkeypatch.undo()
    assert f"# {what} sha256 " in (tmp_path / "run/job.yaml").read_text()
    if what == "data":
        write_rows(tmp_path / "rows.jsonl", 44)
    else:
        file = tmp_path / "llama/model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"] *= 2
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"(?s)this has changed: {what}.*{what}: '.*there.*now"):
        task.run(job)
    assert task.run(tiny_job(tmp_path, *LORA, "steps=3", "resume=force")) == 0
    assert read(tmp_path / "run/result.json")["steps"] == 3


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    job, run = tiny_job(tmp_path, *LORA, "steps=1"), tmp_path / "run"
    run.mkdir()
    held = Lock(run)
    with pytest.raises(UserError, match=f"process {os.getpid()} on .*is at work there"):
        task.run(job)
    held.release()
    assert task.run(job) == 0


def test_full_killed_while_it_hands_over_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    job, run = tiny_job(tmp_path, "method=full", "steps=2"), tmp_path / "run"

    def dies(self: Any, folder: Any, outcome: Any) -> None:
        raise SystemExit(9)

    monkeypatch.setattr(session.Session, "close", dies)
    with pytest.raises(SystemExit):
        task.run(job)
    monkeypatch.undo()
    assert (run / "model/provenance.json").is_file()
    (run / "checkpoints/.step-9.123.tmp").mkdir()
    capfd.readouterr()
    assert task.run(job) == 0
    assert read(run / "result.json")["status"] == "finished"
    assert not (run / "checkpoints/.step-9.123.tmp").exists()
    assert "Writing model shards" not in capfd.readouterr().err
