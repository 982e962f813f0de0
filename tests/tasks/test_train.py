"""Whole runs on a tiny model: what lies in the folder, going on after a stop, what is refused and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ftrun.cli import main
from ftrun.compose import compose
from ftrun.errors import DoesNotFit, Interrupted, UserError
from ftrun.tasks import train as task
from ftrun.train import checkpoint, loop
from tests.jobs import tiny_job


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_what_the_contract_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tiny_job(tmp_path, "method=lora", "rank=4", "steps=3", "lr=1e-2", "eval.every=2")
    assert task.run(job) == 0
    run = tmp_path / "run"
    metrics, evals = lines(run / "metrics.jsonl"), lines(run / "evals.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    named = ["step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "tokens_per_s"]
    named += ["mem_allocated", "mem_peak", "seconds"]
    assert list(metrics[0]) == named
    assert [e["step"] for e in evals] == [0, 2, 3]
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["steps"] == 3
    assert result["eval"]["after"]["loss"] < result["eval"]["before"]["loss"]
    assert result["tokens"] == sum(m["tokens"] for m in metrics)
    assert result["trainable_params"] == sum(
        t.numel() for t in load_file(run / "adapter/adapter_model.safetensors").values()
    )
    plan = json.loads((run / "plan.json").read_text())
    assert sum(plan["at_peak"].values()) == plan["peak_bytes"]
    assert abs(result["memory"]["error"]) < 0.01
    provenance = json.loads((run / "adapter/provenance.json").read_text())
    assert provenance["base"]["hash"] == result["base"]["hash"]
    assert "held-out" in capsys.readouterr().out
    assert "step 3/3" in (run / "log.txt").read_text()
    assert yaml.safe_load((run / "job.yaml").read_text())["rank"] == 4


def test_the_job_file_runs_the_same_job_again(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "method=lora", "rank=4", "steps=2")
    task.run(job)
    again = compose([f"job={tmp_path}/run/job.yaml", f"out={tmp_path}/again"])
    task.run(again)
    first, second = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tiny_job(tmp_path, "method=lora", "steps=1")
    task.run(job)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert task.run(job) == 0
    assert "finished" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_another_job_in_the_folder_is_refused_with_the_difference(tmp_path: Path) -> None:
    task.run(tiny_job(tmp_path, "method=lora", "steps=1", "rank=4"))
    with pytest.raises(UserError, match=r"(?s)another job lies there.*rank: 4 there, 8 now"):
        task.run(tiny_job(tmp_path, "method=lora", "steps=1", "rank=8"))


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    more = (f"method={method}", "steps=5", "lr=1e-2", "save_every=2", "optim=adamw_8bit")
    more += ("dropout=0.2",) if method != "full" else ()
    task.run(tiny_job(tmp_path, *more, f"out={tmp_path}/whole"))
    stopped = tiny_job(tmp_path, *more, f"out={tmp_path}/cut")
    own = loop._count

    def count(progress, record):  # type: ignore[no-untyped-def]
        own(progress, record)
        if record.step == 4:
            raise KeyboardInterrupt  # a kill after the step: two steps since the last checkpoint

    monkeypatch.setattr(loop, "_count", count)
    with pytest.raises(Interrupted, match="goes on from step 2"):
        task.run(stopped)
    monkeypatch.undo()
    assert task.run(stopped) == 0
    made = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / made).read_bytes() == (tmp_path / "whole" / made).read_bytes()
    timeless = [
        [
            {k: m[k] for k in ("step", "loss", "lr", "grad_norm", "tokens")}
            for m in lines(tmp_path / run / "metrics.jsonl")
        ]
        for run in ("whole", "cut")
    ]
    assert timeless[0] == timeless[1]


def test_a_checkpoint_that_is_still_being_written_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny_job(tmp_path, "method=lora", "steps=3", "save_every=2")
    own, write = loop._count, checkpoint.save

    def slowly(*args, **more):  # type: ignore[no-untyped-def]
        time.sleep(1)
        return write(*args, **more)

    def count(progress, record):  # type: ignore[no-untyped-def]
        own(progress, record)
        if record.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_count", count)
    monkeypatch.setattr(checkpoint, "save", slowly)
    with pytest.raises(Interrupted, match="goes on from step 2"):
        task.run(job)


def test_a_request_to_stop_ends_with_a_checkpoint_and_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny_job(tmp_path, "method=lora", "steps=3")
    own = loop._count

    def count(progress, record):  # type: ignore[no-untyped-def]
        own(progress, record)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_count", count)
    with pytest.raises(Interrupted):
        task.run(job)
    monkeypatch.undo()
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["status"], result["steps"]) == ("interrupted", 1)
    assert (tmp_path / "run/checkpoints/step-1/trained.safetensors").is_file()
    assert task.run(job) == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 3


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_named_after_the_time_says_which_folder_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    job = tiny_job(tmp_path, "method=lora", "steps=3", "save_every=1", "out=null")
    own = loop._count

    def count(progress, record):  # type: ignore[no-untyped-def]
        own(progress, record)
        if record.step == 2 and asked:
            os.kill(os.getpid(), signal.SIGTERM)  # the loop ends the step and saves
        elif record.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_count", count)
    with pytest.raises(Interrupted) as stopped:
        task.run(job)
    monkeypatch.setattr(loop, "_count", own)
    (out,) = Path("runs").iterdir()
    assert f"the same command with out={out} goes on from" in str(stopped.value)
    assert task.run(tiny_job(tmp_path, "method=lora", "steps=3", "save_every=1", f"out={out}")) == 0
    assert json.loads((out / "result.json").read_text())["status"] == "finished"
    assert [m["step"] for m in lines(out / "metrics.jsonl")] == [1, 2, 3]
    assert [*Path("runs").iterdir()] == [out]


def test_full_leaves_a_model_that_transformers_loads(tmp_path: Path) -> None:
    task.run(tiny_job(tmp_path, "method=full", "steps=2", "lr=1e-2"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    ids = torch.arange(5, 25)[None]
    assert model.config.use_cache == base.config.use_cache
    assert not torch.equal(model(ids).logits, base(ids).logits)


def test_the_best_weights_are_handed_over(tmp_path: Path) -> None:
    """A rate that destroys what a first step has learnt: the best evaluation comes early."""
    more = ("method=lora", "steps=6", "lr=1.0", "optim=sgd", "eval.every=1", "eval.keep_best=true")
    more += ("optim.schedule=constant", "optim.warmup=0", "optim.clip=null", "optim.momentum=0.99")
    task.run(tiny_job(tmp_path, *more))
    result = json.loads((tmp_path / "run/result.json").read_text())
    evals = lines(tmp_path / "run/evals.jsonl")
    assert result["eval"]["after"]["loss"] == pytest.approx(min(e["loss"] for e in evals[1:]), rel=1e-6)
    assert result["eval"]["after"]["loss"] < evals[-2]["loss"]
    assert [e["step"] for e in evals] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("targets=q_prj",), "q_proj"),
        (("layers=40-50",), "layers"),
        (("device.memory=1MB",), "GB at its peak"),
        (("devices=2", "nnodes=2"), "rdzv_endpoint"),
        (("device=rtx4090",), "not on this machine"),
        (("optim.warmup=50",), "warmup"),
        (("method.from=nowhere",), "nowhere"),
    ],
)
def test_what_is_refused_leaves_no_folder(tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        task.run(tiny_job(tmp_path, "method=lora", "steps=2", *more))
    assert not (tmp_path / "run").exists()
    assert refusal.value.exit_code == (3 if isinstance(refusal.value, DoesNotFit) else 2)


def test_a_finished_run_needs_no_more_what_it_started_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task.run(tiny_job(tmp_path, "method=lora", "rank=4", "steps=1", f"out={tmp_path}/first"))
    start = f"method.from={tmp_path}/first/adapter"
    task.run(tiny_job(tmp_path, "method=lora", "rank=4", "steps=1", start, f"out={tmp_path}/second"))
    shutil.rmtree(tmp_path / "first")
    for line in (["generate", f"run={tmp_path}/second", "prompt=nine?", "max_new_tokens=2"], ["plan"]):
        job = f"job={tmp_path}/second/job.yaml"
        assert main([*line, *([job] if line == ["plan"] else [])]) == 0
    assert main([job, f"out={tmp_path}/third"]) == 2
    assert f"{start}: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()
