"""A disk that is really full: nothing is corrupted, the last checkpoint stays, and the same command goes on later."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftrun.errors import RunFailed
from ftrun.tasks import train as task
from ftrun.train import checkpoint, loop
from tests.forked import Forks
from tests.jobs import overrides, tiny_base, tiny_job, write_rows

FULL = ("method=full", "lr=1e-2", "steps=4", "eval=none", "save_every=1")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here ({done.stderr.decode().strip()}): see the limit on file size")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def weights(run: Path) -> bytes:
    return (run / "model/model.safetensors").read_bytes()


def steps_in(run: Path) -> list[int]:
    whole = (run / "metrics.jsonl").read_text().rpartition("\n")[0]  # without a line that waits for its end
    return [json.loads(line)["step"] for line in whole.splitlines()]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_a_full_disk(tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task.run(tiny_job(tmp_path, *FULL, f"out={tmp_path}/whole"))
    one = size_of(tmp_path / "whole/checkpoints/step-4")
    capsys.readouterr()
    # the first checkpoint fits, the second does not, nor does the model that is handed over
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes((8 << 20) - int(1.2 * one)))
    job = tiny_job(tmp_path, *FULL, f"out={small_disk}/run")
    with pytest.raises(RunFailed, match="No space left"):
        task.run(job)
    said, run = capsys.readouterr().out, small_disk / "run"
    assert "WARNING: NO CHECKPOINT of step 2" in said
    assert checkpoint.load(run / "checkpoints/step-1").progress.step == 1
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-1"]
    assert not (run / "model").exists()
    ballast.unlink()
    assert task.run(job) == 0
    assert weights(run) == weights(tmp_path / "whole")
    assert steps_in(run) == [1, 2, 3, 4]
    assert read(run / "result.json")["status"] == "finished"


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, as a quota has it: the optimiser's state does not fit its file, all other files do."""
    words = overrides(tiny_base(tmp_path / "llama"), write_rows(tmp_path / "rows.jsonl"), *FULL)
    run = tmp_path / "run"
    with Forks() as forks:
        assert forks.run(*words, f"out={tmp_path}/whole").code == 0
        state = (tmp_path / "whole/checkpoints/step-4/optimiser.safetensors").stat().st_size
        assert forks.run(*words, f"out={run}", until=1).code == 130
        ended = forks.run(*words, f"out={run}", until=3, file_size=int(0.8 * state))
        assert ended.code == 4, ended.said
        assert "WARNING: NO CHECKPOINT of step 2" in ended.said
        assert "its checkpoint could not be saved" in ended.said
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-1"]
        ended = forks.run(*words, f"out={run}", file_size=int(0.8 * state))
        assert ended.code == 0, ended.said  # it trains all the same, and what it hands over fits
        assert "The run goes on without it" in ended.said
    assert weights(run) == weights(tmp_path / "whole")
    assert steps_in(run) == [1, 2, 3, 4]


def test_lines_wait_for_room(tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, ballast, run = loop._count, small_disk / "ballast", small_disk / "run"

    def fill() -> None:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def count(progress: loop.Progress, record: Any) -> None:
        own(progress, record)
        if record.step == 1:
            fill()
        elif record.step == 5:
            assert steps_in(run) == []
            ballast.unlink()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "_count", count)
        task.run(tiny_job(tmp_path, "method=lora", "rank=2", "steps=6", "eval=none", f"out={run}"))
    assert steps_in(run) == [1, 2, 3, 4, 5, 6]
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl: CANNOT BE WRITTEN: No space left on device") == 1
    assert "CANNOT BE WRITTEN" in (run / "log.txt").read_text()
