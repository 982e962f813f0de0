"""The launcher: where machines meet, and which workers are started anew."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from ftrun.errors import RunFailed, UserError
from ftrun.train import rendezvous
from ftrun.train.launch import Nodes, first_host, launch, nodes_of
from ftrun.train.ranks import lost_touch

SLURM = {
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "7005",
    "SLURM_JOB_NODELIST": "gpu[03-05,9],cpu1",
}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[03-05,9],cpu1",
}


def test_where_machines_meet() -> None:
    assert nodes_of(None, None, {}) == Nodes()
    assert nodes_of(None, None, SLURM | SRUN) == Nodes(2, "gpu03:29405", "slurm-7005-0")
    second = nodes_of(None, None, SLURM | SRUN | {"SLURM_STEP_ID": "1"})
    assert (second.endpoint, second.key) == ("gpu03:29406", "slurm-7005-1")
    assert nodes_of(2, "gpu1:29400", {}) == Nodes(2, "gpu1:29400", "gpu1-29400")
    with pytest.raises(UserError, match="rdzv_endpoint"):
        nodes_of(2, None, {})
    with pytest.raises(UserError, match=r"rdzv_endpoint=gpu1:29400: has no effect on one machine; give nnodes=2"):
        nodes_of(None, "gpu1:29400", {})


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"), True),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("[enforce fail at /gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
        (OSError("Broken pipe"), False),
    ],
)
def test_what_the_end_of_another_rank_causes_is_known(error: Exception, gone: bool) -> None:
    assert lost_touch(error) is gone


def test_a_batch_script_is_one_machine_and_not_one_of_its_jobs() -> None:
    assert nodes_of(None, None, SLURM) == Nodes()


def test_several_tasks_on_a_node_are_refused() -> None:
    with pytest.raises(UserError, match="found 8 tasks on 2 nodes, expected one on each"):
        nodes_of(None, None, SLURM | SRUN | {"SLURM_STEP_NUM_TASKS": "8"})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("a1,a2", "a1"),
        ("node-7", "node-7"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("rack[1-2]-node[03-05]", "rack1-node03"),
        ("rack[2,4]n[7],x", "rack2n7"),
        ("a[1-2].site", "a1.site"),
    ],
)
def test_the_first_of_slurms_hosts(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def starts(folder: Path, error: Exception | None) -> int:
    """How often a worker is started that ends with exit code 4, having said so or not; two restarts are granted."""
    script, log = folder / "worker.py", folder / "starts"
    script.write_text(f"open({str(log)!r}, 'a').write('x')\nraise SystemExit(4)\n")
    log.unlink(missing_ok=True)
    with pytest.raises(RunFailed, match=str(error or "exit code 4")):
        launch([str(script)], 1, max_restarts=2, ended=lambda: error if log.exists() else None)
    return len(log.read_text())


def test_a_worker_that_said_why_it_ended_is_not_started_anew(tmp_path: Path) -> None:
    assert starts(tmp_path, None) == 3
    assert starts(tmp_path, RunFailed("step 7: loss nan: not finite")) == 1


def test_workers_that_are_started_anew_find_one_another(tmp_path: Path) -> None:
    """The first of two is killed at work; torch's store still holds where both listened then."""
    script = tmp_path / "worker.py"
    script.write_text(f"""
import os, pathlib, signal
from ftrun.train.ranks import end, join
ranks, there = join("cpu"), pathlib.Path({str(tmp_path)!r})
(there / "rounds").open("a").write(os.environ["FTRUN_ROUND"] + "\\n")
ranks.wait()
if ranks.first and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
(there / str(ranks.rank)).write_text(str(ranks.sums([ranks.rank + 1])))
end(0)
""")
    launch([str(script)], 2, max_restarts=1)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["[3.0]"] * 2
    rounds = (tmp_path / "rounds").read_text().split()
    assert sorted(rounds.count(one) for one in set(rounds)) == [2, 2]


def test_a_place_that_nobody_knows_or_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such host"):
        launch(["-c", "0"], 1, Nodes(2, "no-such-host.invalid:29400", "k"))
    monkeypatch.setattr(rendezvous, "PATIENCE", 0)
    monkeypatch.setattr(rendezvous, "_is_here", lambda host: False)
    with pytest.raises(UserError, match=r"localhost:1: nobody answers there"):
        launch(["-c", "0"], 1, Nodes(2, "localhost:1", "k"))


def test_machines_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "PATIENCE", 1)
    began = time.monotonic()
    with pytest.raises(UserError, match="nnodes=2: not all of them came to localhost:"):
        launch([sys.executable, "-c", "0"], 1, Nodes(2, f"localhost:{free_port()}", "k"))
    assert time.monotonic() - began < 30


def free_port() -> int:
    """A port of this machine that nobody has."""
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
