"""Studies as a user runs them: real workers, real jobs, the folder that they leave."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ftrun.runs import read_json
from tests.studies.small import apart, events, ftrun, typed


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def ends(folder: Path) -> list[dict[str, Any]]:
    return [e for e in events(folder) if e["event"] == "end"]


def test_every_combination_runs_and_ends_in_a_table_and_a_page(tmp_path: Path) -> None:
    command = typed(tmp_path, "method=lora,qlora", "rank=2,4")
    done = ftrun(command)
    assert done.returncode == 0, done.stderr
    study = tmp_path / "study"
    assert {p.name for p in study.iterdir()} >= {"study.yaml", "ledger.jsonl", "runs", "report.html", "table.csv"}
    assert [e["status"] for e in ends(study)] == ["finished"] * 4
    rows = table(study)
    assert [(r["method"], r["rank"]) for r in rows] == [
        ("lora", "2"),
        ("lora", "4"),
        ("qlora", "2"),
        ("qlora", "4"),
    ]
    runs = sorted((study / "runs").iterdir())
    assert len(runs) == 4
    for run in runs:
        result = read_json(run / "result.json") or {}
        assert result["status"] == "finished"
        memory = result["memory"]
        assert abs(memory["error"]) < 0.005, memory
        shown = [r for r in rows if float(r["loss"]) == result["eval"]["after"]["loss"]]
        assert shown, (run, rows)
    assert "4 of 4" in done.stdout
    assert "GB at most" in done.stdout

    again = ftrun(command)
    assert again.returncode == 0, again.stderr
    assert len(ends(study)) == 4  # nothing was done twice
    assert table(study) == rows

    larger = ftrun(typed(tmp_path, "method=lora,qlora", "rank=2,4,8"))
    assert larger.returncode == 0, larger.stderr
    assert len(ends(study)) == 6
    assert len(table(study)) == 6


@pytest.mark.slow
def test_a_trial_is_what_the_same_job_alone_is(tmp_path: Path) -> None:
    """Two jobs in one warm worker, the second over the base that the first has left: bit for bit as alone."""
    done = ftrun(typed(tmp_path, "method=qlora,qdora", "launcher.workers=1"))
    assert done.returncode == 0, done.stderr
    logs = [(run / "log.txt").read_text() for run in (tmp_path / "study" / "runs").iterdir()]
    assert sum("\nllama: " in log for log in logs) == 1  # the base was read once
    for run in (tmp_path / "study" / "runs").iterdir():
        alone = tmp_path / "alone" / run.name
        one = apart([f"job={run / 'job.yaml'}", f"out={alone}"])
        assert one.returncode == 0, one.stderr
        for name in ("metrics.jsonl", "evals.jsonl"):
            for mine, theirs in zip(_losses(run / name), _losses(alone / name), strict=True):
                assert mine == theirs, (run.name, name)
        files = [p / "adapter" / "adapter_model.safetensors" for p in (run, alone)]
        assert files[0].read_bytes() == files[1].read_bytes(), run.name


def _losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_points_that_go_wrong_are_rows_with_a_reason(tmp_path: Path) -> None:
    """Invalid and diverging ones beside good ones: the study ends well."""
    done = ftrun(typed(tmp_path, "method=lora,houlsby", "rank=2", "lr=1e-3,1e30"))
    study = tmp_path / "study"
    assert done.returncode == 0, done.stderr + done.stdout
    found = {(r["method"], float(r["lr"])): r for r in table(study)}
    assert found["lora", 1e-3]["status"] == "finished"
    assert found["lora", 1e30]["status"] == "diverged"
    assert "not finite" in found["lora", 1e30]["reason"]
    assert found["houlsby", 1e-3]["status"] == "invalid"
    assert "method=houlsby has no such option" in found["houlsby", 1e-3]["reason"]
    assert "1 of 4" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_what_cannot_fit_is_told_before_anything_starts(tmp_path: Path) -> None:
    done = ftrun(typed(tmp_path, "batch=4,16", "micro_batch=4,16", "device.memory=6MB", "checkpointing=none"))
    rows = {(r["batch"], r["micro_batch"]): r for r in table(tmp_path / "study")}
    assert rows["4", "16"]["status"] == "invalid"
    assert rows["16", "16"]["status"] == "does_not_fit", done.stdout
    assert rows["4", "4"]["status"] == "finished", rows["4", "4"]["reason"]
    first = [e["event"] for e in events(tmp_path / "study")]
    assert "that do not fit" in done.stdout.splitlines()[0]
    assert first.count("begin") == sum(r["status"] == "finished" for r in rows.values())


def test_a_study_of_nothing_but_mistakes_is_one(tmp_path: Path) -> None:
    done = ftrun(typed(tmp_path, "rank=-4,-8"))
    assert done.returncode == 2
    assert "rank=-4: expected an integer, 1 or more" in done.stderr
    assert not (tmp_path / "study").exists()


def test_a_full_disk_is_one_message_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        done = ftrun(typed(tmp_path, "rank=2,4", f"out={disk}"))
        assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
        assert f"ftrun: {disk}" in done.stderr
        assert "No space left on device. The same command goes on with the study" in done.stderr
        assert [p.name for p in disk.iterdir()] == [".lock"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_equal_points_run_once(tmp_path: Path) -> None:
    done = ftrun(typed(tmp_path, "method=lora,qlora", "quant=nf4", "optim=adamw", "checkpointing=none", "rank=4"))
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "study" / "runs").iterdir())) == 1
    assert [r["status"] for r in table(tmp_path / "study")] == ["finished", "same"]


@pytest.mark.slow
def test_the_plan_of_a_study_writes_nothing(tmp_path: Path) -> None:
    command = typed(tmp_path, "rank=2,4", "method=lora,houlsby")
    done = ftrun(["plan", "format=json", *command])
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["points"], made["jobs"], made["fit"]) == (4, 2, 2)
    assert made["seconds"] > 0
    assert made["needed_bytes"] == max(r["needed_bytes"] for r in made["rows"] if r["fits"])
    assert not (tmp_path / "study").exists()
    text = ftrun(["plan", *command])
    assert "2 of 4 points fit" in text.stdout
    assert "houlsby has no such option" in " ".join(text.stdout.split())


def test_a_study_without_m_is_answered(tmp_path: Path) -> None:
    done = ftrun(["search=random", "rank=4"])
    assert (done.returncode, "ftrun -m search" in done.stderr) == (2, True)
