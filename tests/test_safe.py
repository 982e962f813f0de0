"""Nothing that a file contains is run, and nothing that opens a door is written down."""

from __future__ import annotations

import importlib.util
import os
import pickle
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ftrun import cli
from ftrun.kernels import compiled
from ftrun.runs import cache_dir
from ftrun.tasks import train as task
from tests.forked import ROOT, Forks
from tests.jobs import overrides, tiny_base, tiny_job, write_rows

LORA = ("method=lora", "rank=4", "lr=1e-2", "steps=2", "eval=none", "save_every=1")
SECRET = "hf_abcdefghijklmnopqrstuvwxyz0123"


class Mark:
    """A pickle that leaves a mark where it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (os.mkdir, (str(self.path),))


def plant(path: Path, mark: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Mark(mark)))


def test_the_mark_is_left_where_a_pickle_is_opened(tmp_path: Path) -> None:
    plant(tmp_path / "x.bin", tmp_path / "mark")
    pickle.loads((tmp_path / "x.bin").read_bytes())
    assert (tmp_path / "mark").is_dir()


def test_a_planted_pickle_is_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))
    base, rows, mark = tiny_base(tmp_path / "llama"), write_rows(tmp_path / "rows.jsonl"), tmp_path / "mark"
    words = overrides(base, rows, *LORA)
    assert cli.main([*words, f"out={tmp_path}/run"]) == 0
    run = tmp_path / "run"
    # everywhere beside what is read: base, adapter, checkpoint, tokenised rows
    stored = [p.parent for p in (tmp_path / "cache/data").rglob("rows.json")]
    assert stored
    for folder in (base, run / "adapter", run / "checkpoints/step-1", run / "checkpoints/step-2", *stored):
        for name in (
            "adapter_model.bin",
            "optimizer.pt",
            "optimiser.pt",
            "pytorch_model.bin",
            "training_args.bin",
            "rows.pkl",
        ):
            plant(folder / name, mark)
    more = ["optim.schedule=constant", "steps=3", "resume=force"]
    assert cli.main([*words, *more, f"out={run}"]) == 0
    assert cli.main([*words, f"method.from={run}/adapter", f"out={tmp_path}/from", "allow_drift=true"]) == 0
    # in the place of what is read
    capsys.readouterr()
    alone = tmp_path / "alone"
    shutil.copytree(run / "adapter", alone)
    (alone / "adapter_model.safetensors").unlink()
    plant(alone / "adapter_model.bin", mark)
    assert cli.main([*words, f"method.from={alone}", f"out={tmp_path}/a"]) == 2
    assert "adapter_model.bin, a pickle, which is never read" in capsys.readouterr().err
    plant(alone / "adapter_model.safetensors", mark)
    assert cli.main([*words, f"method.from={alone}", f"out={tmp_path}/a"]) == 2
    for folder in stored:
        for path in folder.iterdir():
            plant(path, mark)
    plant(run / "checkpoints/step-3/optimiser.safetensors", mark)
    plant(run / "checkpoints/step-3/state.json", mark)
    assert cli.main([*words, "optim.schedule=constant", "steps=4", f"out={run}"]) == 0
    said = capsys.readouterr().out
    assert "is damaged; it is made anew" in said
    assert "step-3: the checkpoint is damaged" in said
    moved = tmp_path / "pickled"
    shutil.copytree(base, moved)
    (moved / "model.safetensors").unlink()
    assert cli.main([*overrides(moved, rows, *LORA), f"out={tmp_path}/b"]) == 2
    assert not (tmp_path / "b").exists()
    assert not mark.exists()


def test_the_compilers_cache_is_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir as torchs

    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "cache/compile").mkdir(parents=True, mode=0o755)
    made = compiled.compilers_cache()
    assert made == cache_dir() / "compile" == Path(torchs())
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert os.environ["TRITON_CACHE_DIR"] == str(made / "triton")


def test_secrets_reach_no_file_and_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    run = tmp_path / "run"
    words = overrides(tiny_base(tmp_path / "llama"), write_rows(tmp_path / "rows.jsonl"), *LORA, f"out={run}")
    with Forks() as forks:
        ended = forks.run(*words)
        assert ended.code == 0, ended.said
        said = [ended.said]
        said.append(forks.run(*words, "lr=3").said)  # another job lies there
        said.append(forks.run(*words, "prompt=${oc.env:HF_TOKEN}").said)
        said.append(forks.run(*words, "hub_token=1").said)
        said.append(forks.run(*words, "lr=${oc.env:HF_TOKEN}").said)
        said.append(forks.run(*words, f"data.path=/nowhere/{SECRET}").said)
        # a config that holds one: it runs, and writes none
        said.append(forks.run(*words, f"data.template={SECRET}", f"out={tmp_path}/named").said)
        said.append(forks.run(*words, f"data.template={SECRET}", f"out={tmp_path}/named").said)
    assert all(SECRET not in text for text in said), said
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert [p for p in files if SECRET.encode() in p.read_bytes()] == []


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's mount")
@pytest.mark.slow
def test_a_cache_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mounted read-only, so that it holds for root as well: the run goes without it, or says so in one line."""
    cache = tmp_path / "cache"
    cache.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(cache)], capture_output=True, check=False
    ).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        words = overrides(tiny_base(tmp_path / "llama"), write_rows(tmp_path / "rows.jsonl"), *LORA)
        with Forks() as forks:
            for method in ("lora", "qlora"):
                more = [f"method={method}", f"out={tmp_path}/{method}", "eval=held_out", "eval.retention=1"]
                ended = forks.run(*words, *more, env={"FTRUN_CACHE": str(cache)})
                assert ended.code == 0, ended.said
                assert "Traceback" not in ended.said
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_a_clock_that_jumps_moves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    hours = iter(range(0, 10**9, 100))
    monkeypatch.setattr(time, "time", lambda: float(next(hours) * 3600 * (-1) ** next(hours)))
    assert task.run(tiny_job(tmp_path, "method=lora", "rank=4", "steps=3", "eval=none", "save_every=1h")) == 0
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-3"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_a_server_that_takes_calls_and_never_answers(tmp_path: Path) -> None:
    """A tracker's network hangs: the run trains, ends and leaves in time, and says that it did without."""
    words = overrides(tiny_base(tmp_path / "llama"), write_rows(tmp_path / "rows.jsonl"), *LORA, f"out={tmp_path}/run")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.listen(50)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        env = {"WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "WANDB_DIR": str(tmp_path)}
        command = [sys.executable, "-m", "ftrun", *words, "log=wandb"]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=240
        )
    assert done.returncode == 0, done.stderr
    assert "wandb: still not done after" in done.stdout
    assert "finished: 2 steps" in done.stdout
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
