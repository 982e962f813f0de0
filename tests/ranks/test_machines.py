"""One job on two machines: two launchers on this one, which know nothing of one another but where they meet."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftrun.train.rendezvous import _answers
from tests.jobs import overrides, tiny_base, write_rows
from tests.ranks.test_launch import free_port
from tests.ranks.test_runs import STEADY, lines

pytestmark = pytest.mark.slow

WAIT = 600  # seconds at most, on a machine with much else to do


def machine(folder: Path, command: list[str], after: Path | None = None) -> subprocess.Popen[str]:
    """ftrun in a folder of its own; `after`: a process now, which begins once that file is there."""
    folder.mkdir(exist_ok=True)
    wait = f"while [ ! -e {after} ]; do sleep 0.1; done; " if after else ""
    return subprocess.Popen(
        ["sh", "-c", f'{wait}exec "$@"', "sh", *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def ended(*machines: subprocess.Popen[str]) -> list[str]:
    """What each of them said, once all have ended well."""
    said = [one.communicate(timeout=WAIT)[0] for one in machines]
    assert [one.returncode for one in machines] == [0] * len(machines), "\n".join(said)
    return said


def test_the_same_line_on_two_machines_in_either_order(tmp_path: Path) -> None:
    base, rows, port = tiny_base(tmp_path / "llama"), write_rows(tmp_path / "rows.jsonl"), free_port()
    more = ("method=lora", *STEADY, "devices=2", "nnodes=2", f"rdzv_endpoint=localhost:{port}")
    command = [sys.executable, "-m", "ftrun", *overrides(base, rows, *more)]
    one, other = tmp_path / "one", tmp_path / "other"
    # the folder's name holds the time: the first rank's counts, and it alone is made
    first = machine(one, [*command, "steps=2"])
    come(port)
    second = machine(other, [*command, "steps=2"])
    said = ended(first, second)
    (run,) = [*one.glob("runs/*"), *other.glob("runs/*")]
    assert [m["step"] for m in lines(run / "metrics.jsonl")] == [1, 2]
    assert (run / "README.md").is_file()
    assert sum("Traceback" in text for text in said) == 0
    # the first rank by torch's order comes second, to a meeting that the other one holds
    late = machine(one, [*command, "steps=4", f"out={run}"], after=tmp_path / "go")
    early = machine(other, [*command, "steps=4", f"out={run}"])
    come(port)
    (tmp_path / "go").touch()
    said = ended(late, early)
    assert [m["step"] for m in lines(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [text.count("resumed after step 2") for text in said] == [1, 0]


def come(port: int) -> None:
    """Until somebody holds the meeting."""
    until = time.monotonic() + WAIT
    while not _answers("localhost", port):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_lost_machine_is_told_of_on_the_other(tmp_path: Path) -> None:
    base, rows, port = tiny_base(tmp_path / "llama"), write_rows(tmp_path / "rows.jsonl"), free_port()
    more = ("method=lora", *STEADY, "devices=2", "nnodes=2", f"rdzv_endpoint=localhost:{port}", "steps=100000")
    command = [sys.executable, "-m", "ftrun", *overrides(base, rows, *more, f"out={tmp_path / 'run'}")]
    here = machine(tmp_path / "here", command)
    come(port)
    there = machine(tmp_path / "there", command)
    until = time.monotonic() + WAIT
    while not (tmp_path / "run/metrics.jsonl").exists() or not lines(tmp_path / "run/metrics.jsonl"):
        assert time.monotonic() < until
        time.sleep(0.2)
    there.kill()  # its worker goes with it
    gone = time.monotonic()
    said = here.communicate(timeout=WAIT)[0]
    assert time.monotonic() - gone < 60
    assert here.returncode == 4, said
    assert "lost touch with another" in said.splitlines()[-1], said
    assert "Traceback" not in said.splitlines()[-1]
    there.communicate(timeout=WAIT)
