"""launcher=slurm: what sbatch is given, jobs that outlive their study and are found again, submitit on this machine."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftrun.cli import main
from ftrun.compose import compose
from ftrun.dialogue import add_line, read_lines
from ftrun.errors import UserError
from ftrun.runs import read_json
from ftrun.studies import planner
from ftrun.studies.jobs import _reason
from ftrun.studies.launchers import slurm
from ftrun.studies.launching import Task
from tests.studies.scheduler import submissions, with_slurm
from tests.studies.small import alive, apart, descendants, kill_all, started, typed, wait_for
from tests.studies.test_run import ends, table

pytest.importorskip("submitit")


def attempts(study: Path) -> dict[str, list[dict[str, Any]]]:
    """Each task's attempts, by its file's name."""
    found = {p.name.partition(".")[0]: read_lines(p)[0] for p in (study / "tasks").glob("*.events.jsonl")}
    return {name: [e for e in told if e["event"] == "attempt"] for name, told in found.items()}


def finished(study: Path) -> int:
    """How many runs are done."""
    results = [read_json(path) or {} for path in study.glob("runs/*/result.json")]
    return sum(result.get("status") == "finished" for result in results)


def lines(file: Path) -> list[str]:
    """sbatch's options in a file."""
    return [line for line in file.read_text().splitlines() if line.startswith("#SBATCH")]


@pytest.mark.slow
def test_the_files_for_sbatch_are_those_that_submitit_writes(tmp_path: Path) -> None:
    slurm = with_slurm(tmp_path / "slurm")
    own = [
        "launcher=slurm",
        "launcher.partition=short",
        "launcher.account=lab",
        "launcher.time=1.5h",
        "launcher.cpus_per_task=1",
        "launcher.gpus_per_node=2",
        "launcher.mem=3GiB",
        "launcher.array=2",
        "launcher.constraint=a100",
        "launcher.extra={qos: high}",
    ]
    command = typed(tmp_path, "rank=2,4", "steps=2", *own)
    written = apart([*command, "launcher.submit=false"])
    assert written.returncode == 0, written.stderr
    study = tmp_path / "study"
    file = study / "slurm" / "tasks-1.sh"
    assert f"sbatch {file}" in written.stdout
    assert not submissions(tmp_path / "slurm")
    assert {
        "#SBATCH --array=0-1%2",
        "#SBATCH --partition=short",
        "#SBATCH --account=lab",
        "#SBATCH --time=90",
        "#SBATCH --cpus-per-task=1",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --mem=3072M",
        "#SBATCH --constraint=a100",
        "#SBATCH --qos=high",
        "#SBATCH --job-name=ftrun-study",
    } <= set(lines(file))
    (line,) = [x for x in written.stdout.splitlines() if x.startswith("sbatch ")]
    environment = {**os.environ, **slurm}
    subprocess.run(shlex.split(line, comments=True), check=True, env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: finished(study) == 2)  # by hand

    submitted = apart(command, **slurm)  # submitit's own way with the same options; the runs are there
    assert submitted.returncode == 0, submitted.stderr
    ours, theirs = submissions(tmp_path / "slurm")
    assert lines(ours) == [line for line in lines(theirs) if "--comment=ftrun-" not in line]
    assert "-m submitit.core._submit" in theirs.read_text()
    assert [e["status"] for e in ends(study)] == ["finished"] * 2
    assert json.loads((study / "slurm" / "jobs.json").read_text()) == {}


def spread(devices: int, nodes: int | None = None, size: int = 0) -> Task:
    return Task(f"{devices}{nodes}", "train", "abc", {"tree": {"devices": devices, "nnodes": nodes}}, bytes=size)


def test_a_job_of_several_devices_asks_for_them_and_for_cpus_and_memory_in_proportion(tmp_path: Path) -> None:
    launcher = slurm.Launcher(slurm.Options(submit=False), tmp_path)
    keys = ("nodes", "ntasks_per_node", "gpus_per_node", "cpus_per_task")

    def asked(kind: str, task: Task) -> tuple[Any, ...]:
        launcher.devices["abc"] = {"type": kind}
        sbatch = launcher._sbatch([task])
        return (*(sbatch[key] for key in keys), int(sbatch["mem"][:-1]) >> 10)

    card, host = 10 << 30, 40 << 30  # bytes: of a card, and of all the processes of a node
    assert asked("cuda", spread(1, None, card)) == (1, 1, 1, 4, 15)
    assert asked("cuda", spread(4, None, card)) == (1, 1, 4, 16, 60)
    assert asked("cuda", spread(4, 2, card)) == (2, 1, 2, 8, 30)
    assert asked("cpu", spread(4, None, host)) == (1, 1, None, 16, 48)
    kinds = launcher._alike([spread(1), spread(4), spread(4, 2), spread(4)])
    assert [[task.id for task in kind] for kind in kinds] == [["1None"], ["4None", "4None"], ["42"]]
    launcher.options = slurm.Options(submit=False, gpus_per_node=2)
    with pytest.raises(UserError, match=r"launcher.gpus_per_node=2: expected 4 or more"):
        asked("cuda", spread(4))


class Planned:
    """A planner's worker whose plans are there at once."""

    def __init__(self, log: Path) -> None:
        self._asked: list[str] = []

    def send(self, request: dict[str, Any]) -> None:
        self._asked.append(request["id"])

    def receive(self) -> list[dict[str, Any]]:
        plan = {"event": "planned", "status": "finished", "fits": True, "needed_bytes": 1, "device": {"type": "cpu"}}
        told, self._asked = [{**plan, "id": id} for id in self._asked], []
        return told

    def end(self) -> None: ...


def test_one_job_without_m_and_its_file_written_again_over_a_job_that_was_begun_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planner, "Worker", Planned)
    command = typed(tmp_path, "devices=2", "eval=none", "launcher=slurm", "launcher.submit=false")[1:]
    command = [word for word in command if not word.startswith("eval.")]
    for begun in (False, True):
        with pytest.raises(SystemExit, match="0"):
            main(command)
        (file,) = (tmp_path / "study" / "slurm").glob("*.sh")
        assert f"sbatch {file}    # 1 job; its run: {tmp_path / 'study' / 'runs'}" in capfd.readouterr().out
        assert {"#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=8"} <= set(lines(file))
        (task,) = (tmp_path / "study" / "tasks").glob("*.json")
        assert shlex.quote(str(task)) in file.read_text()
        if not begun:
            add_line(task.with_suffix(".events.jsonl"), {"event": "attempt", "number": 1})
            task.with_suffix(".stop").touch()
    assert read_lines(task.with_suffix(".events.jsonl"))[0] == [{"event": "attempt", "number": 1}]
    assert not task.with_suffix(".stop").exists()


def test_a_job_of_several_nodes_is_a_file_for_sbatch_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each node runs the job itself, where it meets the others by what Slurm says; a study follows none of it."""
    monkeypatch.setattr(planner, "Worker", Planned)
    command = typed(tmp_path, "rank=2,4", "devices=4", "nnodes=2", "launcher=slurm", "launcher.cluster=local")
    assert main(command) == 2
    assert "nnodes=2: a job that a study follows has one node; launcher.submit=false" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main([*command, "launcher.submit=false"])
    (file,) = (tmp_path / "study" / "slurm").glob("*.sh")
    assert {"#SBATCH --nodes=2", "#SBATCH --cpus-per-task=8", "#SBATCH --array=0-1%2"} <= set(lines(file))
    assert f'{sys.executable} -m ftrun "$(sed -n' in file.read_text()
    words, places = (file.with_suffix(f".{number}.txt").read_text().split() for number in (1, 2))
    jobs = [compose(line) for line in zip(words, places, strict=True)]
    assert [job.method.options.rank for job in jobs] == [2, 4]
    assert [Path(str(job.out)).parent for job in jobs] == [tmp_path / "study" / "runs"] * 2
    assert [(job.devices, job.nnodes) for job in jobs] == [(4, 2)] * 2
    assert all(Path(word.partition("=")[2]).stat().st_mode & 0o077 == 0 for word in words)


def test_without_m_a_sweep_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launcher=slurm", "rank=4,8"]) == 2
    assert "rank=4,8" in capsys.readouterr().err
    assert main(["launcher=slurm", "recipe=rank-study"]) == 2
    assert "recipe=rank-study is a study of several jobs" in capsys.readouterr().err


@pytest.mark.parametrize("told", [b"cno_such_module\nx\n.", b"cjson\nno_such_name\n.", b"I1\n.", b""])
def test_a_result_that_cannot_be_read_is_a_reason(tmp_path: Path, told: bytes) -> None:
    path = tmp_path / "result.pkl"
    path.write_bytes(told)
    assert str(_reason(SimpleNamespace(paths=SimpleNamespace(result_pickle=path)))).startswith(f"{path}: not readable")


@pytest.mark.slow
def test_jobs_outlive_a_killed_study_and_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before it hears what number its jobs have, and again before it has noted it."""
    for name, value in with_slurm(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    study = tmp_path / "study"
    own = ("launcher=slurm", "launcher.array=2", "launcher.cpus_per_task=1")
    command = typed(tmp_path, "rank=2,4", "steps=8", "save_every=2", *own)
    state, record = tmp_path / "slurm" / "state", study / "slurm" / "jobs.json"
    (state / "kill").touch()
    assert started(command, tmp_path / "log").wait(120) == -signal.SIGKILL
    assert all("job" not in entry for entry in json.loads(record.read_text()).values())

    process = started(command, tmp_path / "log")
    wait_for(lambda: all("job" in e for e in (read_json(record) or {"": {}}).values()) and attempts(study))
    children = kill_all(process)
    wait_for(lambda: not any(alive(p) for p in children), 30)
    assert finished(study) < 2
    assert {(state / name).read_text() for name in ("1_0", "1_1")} == {"CANCELLED"}, "they lacked what they were to do"
    (comment,) = [x.partition("=")[2] for x in lines(submissions(tmp_path / "slurm")[1]) if "--comment" in x]
    found = json.loads(record.read_text())
    announced = {n: {"token": comment, "place": int(e["job"][-1]), "tries": 0} for n, e in found.items()}
    record.write_text(json.dumps(announced))

    done = apart(command)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in submissions(tmp_path / "slurm")] == ["1.sh", "2.sh"]
    assert sorted(e["status"] for e in ends(study)) == ["finished"] * 2
    assert [len(tries) for tries in attempts(study).values()] == [1] * 2
    assert json.loads((study / "slurm" / "jobs.json").read_text()) == {}


@pytest.mark.slow
def test_a_job_out_of_time_goes_on_and_an_interrupt_ends_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in with_slurm(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    study = tmp_path / "study"
    own = ("launcher=slurm", "launcher.array=1", "launcher.cpus_per_task=1")
    process = started(typed(tmp_path, "rank=2,4", "steps=2000", "save_every=null", *own), tmp_path / "log")
    (metrics,) = wait_for(lambda: [p for p in study.glob("runs/*/metrics.jsonl") if p.stat().st_size])
    ((name, (one,)),) = attempts(study).items()
    submit = Path(f"/proc/{one['pid']}/status").read_text().partition("PPid:\t")[2].split()[0]
    os.kill(int(submit), signal.SIGUSR2)  # what Slurm sends when the time is nearly up
    wait_for(lambda: len(attempts(study)[name]) == 2)
    steps = len(metrics.read_text().splitlines())
    assert list(metrics.parent.glob("checkpoints/step-*"))
    wait_for(lambda: len(metrics.read_text().splitlines()) > steps)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()][:steps] == [*range(1, steps + 1)]

    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    state = tmp_path / "slurm" / "state"
    wait_for(lambda: "RUNNING" not in {(state / n).read_text() for n in ("1_0", "1_1")}, 30)
    assert "CANCELLED" in {(state / n).read_text() for n in ("1_0", "1_1")}  # the one that had not begun
    assert json.loads((study / "slurm" / "jobs.json").read_text()) == {}


@pytest.mark.slow
def test_without_slurm_here_a_lost_job_is_tried_again_and_none_outlives_the_study(tmp_path: Path) -> None:
    study = tmp_path / "study"
    own = ("launcher=slurm", "launcher.cluster=local", "launcher.array=2", "launcher.cpus_per_task=1")
    command = typed(tmp_path, "rank=2,4", "steps=8", "save_every=2", *own)
    process = started(command, tmp_path / "log")
    wait_for(lambda: list(study.glob("runs/*/checkpoints/step-*")))
    children = kill_all(process)
    assert [p for p in children if "submitit" in _command(p)] or len(children) >= 4
    wait_for(lambda: not any(alive(p) for p in children), 30)

    process = started(command, tmp_path / "log")
    first = wait_for(lambda: [t for tries in attempts(study).values() for t in tries if alive(t["pid"])])[0]
    assert first["pid"] in descendants(process.pid)
    os.kill(first["pid"], signal.SIGKILL)
    assert process.wait(240) == 0, (tmp_path / "log").read_text()
    assert "the worker died: killed (SIGKILL)" in (tmp_path / "log").read_text()
    assert [r["status"] for r in table(study)] == ["finished"] * 2
    assert sorted(len(tries) for tries in attempts(study).values()) == [1, 2]


def test_slurm_is_asked_for_where_it_is_not(tmp_path: Path) -> None:
    done = apart(typed(tmp_path, "rank=2,4", "launcher=slurm", "launcher.cluster=slurm"), PATH="/nowhere")
    assert done.returncode == 2
    assert "launcher.cluster=slurm: found no sbatch here" in done.stderr


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
