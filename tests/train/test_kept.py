"""What the frozen layers give a row is kept from epoch to epoch: the same training, whoever stopped it and whatever was
lost on the way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ftrun import assemble, stepping
from ftrun.errors import Interrupted, UserError
from ftrun.planning import keeping
from ftrun.runs import cache_dir
from ftrun.tasks import train as task
from ftrun.train import loop
from ftrun.train.kept import InMemory, KeptLoss, KeptRows, OnDisk
from tests.families import FACTS
from tests.jobs import tiny_base, tiny_job

DEPTH = 5
LORA = ("method=lora", "rank=4", "lr=1e-2", "layers=last:2", "epochs=3", "eval=none", "micro_batch=2")


def ran(tmp_path: Path, name: str, *more: str, family: str = "llama", **sizes: Any) -> Path:
    """The folder of a whole run."""
    tiny_base(tmp_path / family, family, **(sizes or {"num_hidden_layers": DEPTH}))
    task.run(tiny_job(tmp_path, *more, f"out={tmp_path / name}", family=family))
    return tmp_path / name


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def decided(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "plan.json").read_text())["kept_prefix"])


SAME = [
    ("method=lora", "rank=4"),
    ("method=lora", "rank=4", "kernels=reference"),
    ("method=dora", "rank=4", "checkpointing=all"),
    ("method=full", "kernels=reference"),
    ("method=qlora", "rank=4", "checkpointing=1"),
    ("method=houlsby",),
]


@pytest.mark.parametrize("method", SAME, ids="-".join)
@pytest.mark.few(1)
def test_the_same_training_with_and_without(tmp_path: Path, method: tuple[str, ...]) -> None:
    common = (*method, "lr=1e-3", *LORA[3:])
    runs = [ran(tmp_path, where, *common, f"keep_prefix={where}") for where in ("none", "memory", "disk")]
    assert [decided(run)["where"] for run in runs] == ["none", "memory", "disk"]
    plain, *kept = map(losses, runs)
    assert len(plain) == 27
    for found in kept:
        assert found == pytest.approx(plain, rel=1e-6)
        assert found[:9] == plain[:9]  # in the first epoch each row is beside those that it is kept with
        assert found == kept[0]
    records = [[json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert all([r["tokens"] for r in found] == [r["tokens"] for r in records[0]] for found in records)
    assert not (tmp_path / "disk" / keeping.FOLDER).exists()


@pytest.mark.parametrize(("where", "steps"), [("memory", 4), ("memory", 13), ("disk", 4), ("disk", 9), ("disk", 22)])
@pytest.mark.few(1)
def test_a_run_that_was_stopped_ends_byte_for_byte_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, steps: int
) -> None:
    whole = ran(tmp_path, "whole", *LORA, f"keep_prefix={where}")
    stop_after(monkeypatch, steps)
    with pytest.raises(Interrupted):
        ran(tmp_path, "run", *LORA, f"keep_prefix={where}")
    monkeypatch.undo()
    assert (tmp_path / "run" / keeping.FOLDER).exists() == (where == "disk")
    made = counted(monkeypatch)
    run = ran(tmp_path, "run", *LORA, f"keep_prefix={where}")
    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)
    # what a run that goes on must compute: in memory every group, on disk those that were not met
    assert len(made) == 18 - (min(steps, 9) * 2 if where == "disk" else 0)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    own = loop._count

    def count(progress: loop.Progress, record: Any) -> None:
        own(progress, record)
        if record.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "_count", count)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The groups that are computed from now on."""
    made: list[int] = []
    own = KeptRows._make

    def make(self: KeptRows, number: int, batch: Any) -> None:
        made.append(number)
        own(self, number, batch)

    monkeypatch.setattr(KeptRows, "_make", make)
    return made


DAMAGE = {
    "a byte": lambda folder: flip(folder / "rows.bin"),
    "its end": lambda folder: os.truncate(folder / "rows.bin", (folder / "rows.bin").stat().st_size // 2),
    "the rows": lambda folder: (folder / "rows.bin").unlink(),
    "the sums": lambda folder: (folder / "rows.jsonl").unlink(),
    "a sum": lambda folder: (folder / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes()[:-9]),
    "another's": lambda folder: (folder / "rows.jsonl").write_text('{"of": "another"}\n{"0": 1}\n'),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.few(1)
def test_a_damaged_file_is_noticed_and_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    whole = ran(tmp_path, "whole", *LORA, "keep_prefix=disk")
    stop_after(monkeypatch, 13)
    with pytest.raises(Interrupted):
        ran(tmp_path, "run", *LORA, "keep_prefix=disk")
    monkeypatch.undo()
    DAMAGE[what](tmp_path / "run" / keeping.FOLDER)
    made = counted(monkeypatch)
    capsys.readouterr()
    run = ran(tmp_path, "run", *LORA, "keep_prefix=disk")
    assert weights(run) == weights(whole)
    assert made
    if what in ("a byte", "its end", "the rows"):
        assert "were damaged; they are computed again" in capsys.readouterr().out


@pytest.mark.slow
def test_steps_that_run_over_the_end_of_an_epoch(tmp_path: Path) -> None:
    """A job told its steps fills a batch with the next epoch's first rows."""
    common = (*LORA[:4], "steps=20", *LORA[5:], "batch=10", "micro_batch=5")
    plain, kept = (ran(tmp_path, w, *common, f"keep_prefix={w}") for w in ("none", "memory"))
    assert losses(kept) == pytest.approx(losses(plain), rel=1e-6)


@pytest.mark.parametrize("family", FACTS)
def test_every_family(tmp_path: Path, family: str) -> None:
    """Each goes on from what is kept as it would whole, or says why it does not."""
    sizes = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
    tiny_base(tmp_path / family, family, **sizes)
    job = tiny_job(tmp_path, *LORA, "targets=attention", family=family)
    parts = assemble.sketch(job, cache_dir(), print, whole=True)
    corpus = assemble.rows(job, parts, cache_dir(), print)
    assemble.furnish(job, parts, torch.device("cpu"), cache_dir(), print, recomputed=0)
    work = assemble.work(job, parts, torch.device("cpu"), total=2)
    kept = assemble.kept_rows(job, parts, corpus, 2, 0, InMemory(), work, print)
    loss = KeptLoss(work.loss, kept)
    for step in (0, 1, 9, 10):
        for batch in stepping.step_batches(job, corpus, 2, 0, step):
            with torch.no_grad():
                assert float(loss(batch)) == pytest.approx(float(work.loss(batch)), rel=1e-6)


def test_evaluation_and_answers_run_the_whole_model(tmp_path: Path) -> None:
    common = (*(m for m in LORA if m != "eval=none"), "eval.every=9")
    runs = [ran(tmp_path, where, *common, f"keep_prefix={where}") for where in ("none", "memory")]
    evals = [[json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()] for run in runs]
    assert len(evals[0]) == len(evals[1]) == 4
    for one, other in zip(*evals, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one.get("answer") == other.get("answer")


def test_what_cannot_be_kept_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (("layers=all",), ("layers=last:2", "targets=[attention,embeddings]"), ("method=prompt",)):
        common = ("method=lora",) if "method=prompt" not in more else ()
        with pytest.raises(UserError, match=r"keep_prefix=memory: .*no layer stays as it is"):
            ran(tmp_path, "a", *common, *more, "epochs=3", "eval=none", "keep_prefix=memory")
    once = ("method=lora", "layers=last:2", "eval=none")
    capsys.readouterr()
    assert decided(ran(tmp_path, "b", *once, "epochs=1", "keep_prefix=disk"))["where"] == "none"
    assert "warning: keep_prefix=disk: nothing is kept: no row is seen more than once" in capsys.readouterr().out
    assert decided(ran(tmp_path, "c", *once, "epochs=1"))["where"] == "none"
    assert "keep_prefix:" not in capsys.readouterr().out


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping._Choice, "free_on_disk", lambda self: 1000)
    with pytest.raises(UserError, match=r"keep_prefix=disk: .* are to be kept, and .* has 0\.00 GB free"):
        ran(tmp_path, "a", *LORA, "keep_prefix=disk")
    monkeypatch.setattr(keeping._Choice, "_room", lambda self: 0)
    assert decided(ran(tmp_path, "b", *LORA))["where"] == "none"
    monkeypatch.setattr(keeping._Choice, "free_on_disk", lambda self: 10**9)
    assert decided(ran(tmp_path, "c", *LORA))["where"] == "disk"


def test_a_run_that_goes_on_keeps_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept outputs have other last bits than new ones: what the memory at hand says now must not decide."""
    whole = ran(tmp_path, "whole", *LORA)
    stop_after(monkeypatch, 13)
    with pytest.raises(Interrupted):
        ran(tmp_path, "run", *LORA)
    monkeypatch.undo()
    monkeypatch.setattr(keeping._Choice, "_room", lambda self: 0)
    run = ran(tmp_path, "run", *LORA)
    assert decided(run)["where"] == "disk"
    assert weights(run) == weights(whole)


def test_a_file_of_another_job_is_not_taken(tmp_path: Path) -> None:
    rows = torch.arange(12, dtype=torch.bfloat16).view(6, 2)
    for facts, there in (({"seed": 1}, None), ({"seed": 1}, True), ({"seed": 2}, None)):
        store = OnDisk(tmp_path / "kept", facts)
        store.open(6, 2, torch.bfloat16)
        into = torch.zeros(4, 2, dtype=torch.bfloat16)
        assert store.read(2, into) is there
        if there:
            assert torch.equal(into, rows[2:])
        store.write([0, 2], [rows[:2], rows[2:]])
        store.close()
