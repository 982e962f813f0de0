"""Whole runs of two processes over gloo: resumed on one and back, killed, within a study."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftrun.errors import DoesNotFit
from ftrun.tasks import train
from ftrun.train.launch import launch
from tests.jobs import overrides, tiny_base, tiny_job, write_rows

pytestmark = pytest.mark.slow

STEADY = ("optim.schedule=constant", "optim.warmup=0", "micro_batch=1", "eval.retention=0", "eval.max_new_tokens=0")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("method", "strategy"), [("qlora", "ddp"), ("full", "fsdp")])
def test_saved_on_two_resumed_on_one_and_back(tmp_path: Path, method: str, strategy: str) -> None:
    more = (f"method={method}", *STEADY, "save_every=2", *(("optim=adamw",) if method == "full" else ()))
    train.run(tiny_job(tmp_path, *more, "steps=6", f"out={tmp_path}/whole"))
    for steps, devices in ((2, 2), (4, 1), (6, 2)):
        sharing = (f"devices={devices}", *((f"strategy={strategy}",) if devices > 1 else ()))
        train.run(tiny_job(tmp_path, *more, f"steps={steps}", *sharing, f"out={tmp_path}/cut"))
    whole, cut = lines(tmp_path / "whole/metrics.jsonl"), lines(tmp_path / "cut/metrics.jsonl")
    assert [m["step"] for m in cut] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(whole, cut, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert (other["tokens"], other["supervised_tokens"]) == (one["tokens"], one["supervised_tokens"])
    made = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    one, other = load_file(tmp_path / "whole" / made), load_file(tmp_path / "cut" / made)
    assert one.keys() == other.keys()
    # Adam divides by a gradient's size: where that is next to nothing, its rounding shows
    for name, tensor in one.items():
        assert torch.linalg.norm(tensor - other[name]) <= 1e-3 * torch.linalg.norm(tensor), name
    result = json.loads((tmp_path / "cut/result.json").read_text())
    assert result["status"] == "finished"
    assert (tmp_path / "cut/README.md").is_file()


def test_a_killed_worker_takes_the_job_down_and_it_goes_on_exactly(tmp_path: Path) -> None:
    base, rows = tiny_base(tmp_path / "llama"), write_rows(tmp_path / "rows.jsonl")
    more = overrides(base, rows, "method=lora", *STEADY, "eval=none", "save_every=4", "steps=80", "devices=2")
    more = [o for o in more if not o.startswith("eval.")]
    command = [sys.executable, "-m", "ftrun", *more]
    whole = subprocess.run([*command, f"out={tmp_path}/whole"], capture_output=True, text=True, timeout=200)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    started = subprocess.Popen(
        [*command, f"out={tmp_path}/cut"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "cut/metrics.jsonl"
    until = time.monotonic() + 120
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 10:
        assert time.monotonic() < until
        assert started.poll() is None
        time.sleep(0.05)
    workers = [p for p in children(started.pid) if "ftrun.tasks.rank" in cmdline(p)]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    began = time.monotonic()
    said, _ = started.communicate(timeout=60)
    assert started.returncode == 4, said
    assert time.monotonic() - began < 60
    assert "Traceback" not in said.splitlines()[-1]
    assert said.splitlines()[-1].startswith("ftrun: ")
    assert not any(Path(f"/proc/{p}").exists() for p in workers)
    again = subprocess.run([*command, f"out={tmp_path}/cut"], capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed after step" in again.stdout
    made = "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / made).read_bytes() == (tmp_path / "whole" / made).read_bytes()
    assert [m["step"] for m in lines(metrics)] == list(range(1, 81))


def test_two_devices_with_dropout_go_on_with_the_masks_that_they_would_have_drawn(tmp_path: Path) -> None:
    """Rows of unequal lengths, so that one rank draws more numbers than the other."""
    base, rows = tiny_base(tmp_path / "llama"), write_rows(tmp_path / "rows.jsonl")
    more = ("method=lora", "dropout=0.3", "steps=4", "save_every=2", "micro_batch=1", "eval=none", "devices=2")
    launch(["-m", "tests.ranks.again", str(tmp_path), *overrides(base, rows, *more)], 2)
    random = load_file(tmp_path / "whole/checkpoints/step-2/random.safetensors")
    assert not torch.equal(random["cpu"], random["cpu@1"])
    assert "resumed after step 2" in (tmp_path / "cut/log.txt").read_text()
    made = "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / made).read_bytes() == (tmp_path / "whole" / made).read_bytes()


def test_8_bit_state_of_parts_goes_on_in_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its parts are small enough for float32 moments where the whole weights have 8 bits: that is said."""
    more = ("method=full", "optim=adamw_8bit", *STEADY, "eval.before=false")
    train.run(tiny_job(tmp_path, *more, "steps=4", f"out={tmp_path}/whole"))
    cut = (*more, "save_every=2", f"out={tmp_path}/cut")
    train.run(tiny_job(tmp_path, *cut, "steps=2", "devices=2", "strategy=fsdp"))
    state = json.loads((tmp_path / "cut/checkpoints/step-2/state.json").read_text())["optimiser"]
    assert len(state["ranks"]) == 2
    capsys.readouterr()
    train.run(tiny_job(tmp_path, *cut, "steps=4"))
    assert "quantised anew, which is not exact" in capsys.readouterr().out
    for one, other in zip(*(lines(tmp_path / run / "metrics.jsonl") for run in ("whole", "cut")), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_a_study_of_jobs_on_two_devices_makes_a_folder_a_job(tmp_path: Path) -> None:
    base, rows = tiny_base(tmp_path / "llama"), write_rows(tmp_path / "rows.jsonl")
    more = overrides(base, rows, "method=lora", *STEADY, "rank=2,4", "steps=2", "devices=2")
    done = subprocess.run(
        [sys.executable, "-m", "ftrun", "-m", *more, f"out={tmp_path}/study"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 done" in done.stdout
    runs = sorted((tmp_path / "study/runs").iterdir())
    assert len(runs) == 2
    assert all(json.loads((run / "result.json").read_text())["status"] == "finished" for run in runs)


def test_a_job_that_does_not_fit_is_refused_by_its_ranks_as_by_one_process(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="GB at its peak"):
        train.run(tiny_job(tmp_path, "method=lora", *STEADY, "steps=2", "devices=2", "device.memory=1MB"))
    assert not (tmp_path / "run").exists()


def children(pid: int) -> list[int]:
    """Processes that a process started, and theirs."""
    found = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and parent(int(p.name)) == pid]
    return sorted([*found, *(below for child in found for below in children(child))])


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
