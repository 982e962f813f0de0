"""launcher=ray on a real cluster of this machine: workers that are killed, a study that is killed, and what is left."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftrun.errors import UserError
from ftrun.studies.launchers import ray
from ftrun.studies.launching import Task
from tests.studies.small import alive, apart, descendants, kill_all, started, typed, wait_for
from tests.studies.test_run import ends, table
from tests.studies.test_slurm import attempts, finished

pytest.importorskip("ray")

OWN = ("launcher=ray", "launcher.cpus=1", "launcher.workers=2")


def at_work(study: Path, steps: int, but: str = "") -> dict[str, Any]:
    """An attempt whose process lives and whose run has a checkpoint of so many steps, at another task than `but`."""

    def found() -> dict[str, Any] | None:
        for name, tries in attempts(study).items():
            for run in study.glob(f"runs/*-{name.split('-')[1][:8]}"):
                if name != but and alive(tries[-1]["pid"]) and (run / "checkpoints" / f"step-{steps}").is_dir():
                    return {**tries[-1], "name": name, "run": run}
        return None

    return wait_for(found)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("PPid:\t")[2].split()[0])


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_eight_jobs_over_two_workers_that_are_killed(tmp_path: Path) -> None:
    """One of Ray's own processes, one that trains, and in the end all of the study at once."""
    study = tmp_path / "study"
    points = ("rank=2,4,8,16", "layers=all,first:1", "steps=60", "save_every=10")
    command = typed(tmp_path, *points, *OWN)
    process = started(command, tmp_path / "log")

    first = at_work(study, 10)
    rays = parent(first["pid"])
    assert rays in descendants(process.pid)
    os.kill(rays, signal.SIGKILL)
    wait_for(lambda: not alive(first["pid"]), 5)  # it dies with Ray's process
    wait_for(lambda: len(attempts(study)[first["name"]]) == 2)
    second = at_work(study, 10, but=first["name"])
    os.kill(second["pid"], signal.SIGKILL)
    wait_for(lambda: len(attempts(study)[second["name"]]) == second["number"] + 1)

    at_work(study, 10)
    children = kill_all(process)
    names = {(Path(f"/proc/{p}/cmdline").read_bytes().split(b"\0")[0].decode()) for p in children if alive(p)}
    wait_for(lambda: not any(alive(p) for p in children), 30)
    assert any("raylet" in n or "ray::" in n for n in names) or len(children) > 5, names
    done = finished(study)
    assert done < 8

    again = apart(command)
    assert again.returncode == 0, again.stderr
    assert [r["status"] for r in table(study)] == ["finished"] * 8
    assert finished(study) == 8
    for run in (study / "runs").iterdir():
        assert steps_of(run) == [*range(1, 61)], run
    for killed in (first, second):
        assert "resumed after step" in (killed["run"] / "log.txt").read_text()
    assert len({e["key"] for e in ends(study) if e["status"] == "finished"}) == 8


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster that was there before: two CPUs, and a card that only Ray believes in."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        port, client = one.getsockname()[1], other.getsockname()[1]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={port}", "--block"]
    command += ["--num-cpus=2", "--num-gpus=1", "--include-dashboard=false", "--disable-usage-stats"]
    with (tmp_path / "cluster.log").open("wb") as log:
        head = subprocess.Popen([*command, f"--ray-client-server-port={client}"], stdout=log, stderr=log)
    wait_for(lambda: b"Ray runtime started" in (tmp_path / "cluster.log").read_bytes())
    children = descendants(head.pid)
    yield f"127.0.0.1:{port}"
    head.terminate()
    head.wait()
    wait_for(lambda: not any(alive(p) for p in children), 30)


@pytest.mark.slow
def test_a_running_cluster_by_its_address(tmp_path: Path, cluster: str) -> None:
    own = ("launcher=ray", f"launcher.address={cluster}", "launcher.cpus=1")
    done = apart(typed(tmp_path, "device=cpu,a100-80gb", *own))
    assert done.returncode == 0, done.stderr
    rows = {r["device"]: r for r in table(tmp_path / "study")}
    assert rows["cpu"]["status"] == "finished"
    assert rows["a100-80gb"]["status"] == "invalid"  # planned here, sent to the card, and told that there is none
    assert "not on this machine" in rows["a100-80gb"]["reason"]

    anything = apart(typed(tmp_path, "rank=2,4", "device=auto", f"out={tmp_path / 'auto'}", *own))
    assert anything.returncode == 2
    assert "device=auto: this machine has no CUDA device to plan for" in anything.stderr


@pytest.mark.parametrize(("share", "gpus"), [(0.01, 0.05), (0.05, 0.05), (0.31, 0.35), (0.35, 0.35), (1.0, 1.0)])
def test_a_card_is_shared_by_the_plan(tmp_path: Path, share: float, gpus: float) -> None:
    launcher = ray.Launcher(ray.Options(), tmp_path)
    launcher.devices["abc"] = {"type": "cuda", "usable_bytes": 80_000_000_000}
    alone = {"tree": {"devices": 1, "nnodes": None}}
    demand = launcher._demand(Task("0", "train", "abc", alone, bytes=int(share * 80e9), share=share))
    assert demand == {"CPU": 1, "GPU": gpus, "memory": 0}


def test_a_job_of_several_devices_takes_whole_cards_and_as_many_cpus(tmp_path: Path) -> None:
    launcher = ray.Launcher(ray.Options(), tmp_path)
    launcher._nodes = [{"CPU": 16, "memory": 1000}]

    def demand(kind: str, nodes: int | None = None) -> dict[str, float]:
        launcher.devices["abc"] = {"type": kind}
        tree = {"devices": 4, "nnodes": nodes}
        return launcher._demand(Task("0", "train", "abc", {"tree": tree}, bytes=800, share=0.2))

    assert demand("cuda") == {"CPU": 4, "GPU": 4, "memory": 0}
    assert demand("cpu") == {"CPU": 8, "GPU": 0, "memory": 800}
    with pytest.raises(UserError, match="nnodes=2: launcher=ray gives a job one node"):
        demand("cuda", nodes=2)
    launcher.options = ray.Options(gpus=0.5)
    with pytest.raises(UserError, match=r"launcher.gpus=0.5: a job of devices=4 takes whole GPUs"):
        demand("cuda")
