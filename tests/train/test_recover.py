"""Memory that runs out in a step, and losses that are no numbers: the run goes on, and ends as it would have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ftrun.data.batches import step_rows
from ftrun.errors import RunFailed
from ftrun.metrics.console import Console
from ftrun.runs import Run, cache_dir
from ftrun.tasks import session
from ftrun.tasks import train as task
from ftrun.train import checkpoint
from tests.families import save_tiny
from tests.forked import Forks
from tests.jobs import tiny_job


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A job of logits that take most of its memory. The rows of its third step are ten times as long as the others."""
    folder = tmp_path_factory.mktemp("tight")
    save_tiny("llama", folder / "base", vocab_size=20_000, intermediate_size=128, max_position_embeddings=512)
    long = step_rows(32, 8, 2, seed=0)
    rows = [{"question": f"{n} " + "why " * (55 if n in long else 1), "answer": f"so {n}"} for n in range(32)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"model.path={folder / 'base'}", "data=jsonl", f"data.path={folder / 'rows.jsonl'}", "method=lora", "rank=4",
        "lr=1e-2", "dropout=0.1", "kernels=reference", "batch=8", "steps=4", "checkpointing=none", "eval=none",
        "device=cpu", "data.held_out=0", "refuse=false", "save_every=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as made:
        yield made


def planned(forks: Forks, words: list[str]) -> int:
    said = forks.run("plan", *words, "format=json", "savings=0").said
    return int(json.JSONDecoder().raw_decode(said[said.index("{") :])[0]["peak_bytes"])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def weights(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def test_a_run_that_runs_out_of_memory_goes_on_as_one_told_to_take_fewer_rows(
    tmp_path: Path, words: list[str], forks: Forks
) -> None:
    """A real limit on address space. The other run is told by the command line: stopped there, and gone on with."""
    size = planned(forks, [*words, "micro_batch=8"])
    short, told = f"out={tmp_path}/short", f"out={tmp_path}/told"
    # it runs out in step 3, is stopped right after it, and goes on where memory is plenty
    ended = forks.run(*words, "micro_batch=8", short, more=int(0.65 * size), until=3)
    assert ended.code == 130, ended.said
    assert "WARNING: step 3: OUT OF MEMORY (" in ended.said
    assert "with 4 rows at once instead of 8" in ended.said
    made = checkpoint.load(tmp_path / "short/checkpoints/step-3").progress.recoveries
    assert made[0] == {"step": 3, "micro_batch": 4, "recomputed": 0}
    rows = made[-1]["micro_batch"]  # 4, but a heap in pieces may not hold them
    ended = forks.run(*words, "micro_batch=8", short)
    assert ended.code == 0, ended.said
    assert f"memory ran out in step 3: goes on with {rows} rows at once" in ended.said
    assert read(tmp_path / "short/result.json")["recoveries"] == made
    assert steps_in(tmp_path / "short/metrics.jsonl") == [1, 2, 3, 4]

    assert forks.run(*words, "micro_batch=8", told, until=2).code == 130
    ended = forks.run(*words, f"micro_batch={rows}", told, "resume=force")
    assert ended.code == 0, ended.said
    assert weights(tmp_path / "short") == weights(tmp_path / "told")
    assert forks.run(*words, "micro_batch=8", f"out={tmp_path}/never").code == 0
    assert weights(tmp_path / "short") != weights(tmp_path / "never")  # in their last bits: the comparison can fail


def test_one_row_that_does_not_fit_is_named(tmp_path: Path, words: list[str], forks: Forks) -> None:
    size = planned(forks, [*words, "micro_batch=1"])
    ended = forks.run(*words, "micro_batch=2", f"out={tmp_path}/run", more=int(0.4 * size))
    said = ended.said
    assert ended.code == 4, said
    assert "with 1 rows at once instead of 2" in said
    assert "with 2 layers recomputed instead of 1" in said
    assert "step 3: out of memory: one row does not fit, 2 layers recomputed: " in said
    assert "rows.jsonl:" in said.splitlines()[-1]
    assert checkpoint.load(tmp_path / "run/checkpoints/step-2").progress.step == 2
    assert read(tmp_path / "run/result.json")["status"] == "failed"


def test_a_step_that_is_not_finite_changes_nothing_and_one_too_many_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of the adapter that give no number at some rows: a loss that is multiplied there."""
    job = ("method=lora", "rank=4", "lr=1e-2", "steps=5", "eval=none", "save_every=1", "save_last=9")
    own = session.Session._equip
    bad: set[int] = {2}

    def equip(self: session.Session) -> None:
        own(self)
        inner = self.work.loss
        factor = lambda: float("nan") if self.progress.step + 1 in bad else 1.0  # noqa: E731
        self.work.loss = lambda batch: inner(batch) * factor()

    monkeypatch.setattr(session.Session, "_equip", equip)
    run = tmp_path / "run"
    assert task.run(tiny_job(tmp_path, *job)) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row.get("skipped", False) for row in rows] == [False, True, False, False, False]
    assert rows[1]["loss"] is None
    assert "step 2: loss nan" in (said := capsys.readouterr().out)
    assert f"ITS UPDATE IS SKIPPED, the 1. of at most 3. Rows of the batch: [{tmp_path}/rows.jsonl:" in said
    result = read(run / "result.json")
    assert (result["skipped"], result["status"]) == ([2], "finished")
    one, two = (checkpoint.load(run / f"checkpoints/step-{n}") for n in (1, 2))
    assert all(torch.equal(tensor, two.trained[name]) for name, tensor in one.trained.items())
    assert all(torch.equal(tensor, two.optimiser[name]) for name, tensor in one.optimiser.items())

    bad |= {3, 4}
    with pytest.raises(RunFailed, match=r"step 4: loss nan.*as were steps \[2, 3\].*Rows of the batch: \[") as ended:
        task.run(tiny_job(tmp_path, *job, "skip_nonfinite=2", f"out={tmp_path}/b"))
    assert ended.value.exit_code == 4
    assert steps_in(tmp_path / "b/metrics.jsonl") == [1, 2, 3]
    assert checkpoint.load(tmp_path / "b/checkpoints/step-3").progress.skipped == [2, 3]
    # more of them allowed: it goes on
    assert task.run(tiny_job(tmp_path, *job, "skip_nonfinite=3", f"out={tmp_path}/b")) == 0
    assert steps_in(tmp_path / "b/metrics.jsonl") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (["batch=12", "micro_batch=6", "devices=2"], "GB at the peak. micro_batch=3 resume=force needs less"),
        (["batch=10", "micro_batch=5", "devices=2"], "micro_batch=1 resume=force needs less"),
        (["micro_batch=1", "checkpointing=none"], "checkpointing=all resume=force needs less"),
        (["micro_batch=1", "checkpointing=all"], r"GB at the peak$"),
    ],
)
def test_a_run_that_cannot_recover_says_what_needs_less(tmp_path: Path, job: list[str], said: str) -> None:
    made = tiny_job(tmp_path, "method=lora", "strategy=ddp" if "devices=2" in job else "strategy=auto", *job)
    one = session.Session(made, cache_dir(), Console())
    one.prepare(tmp_path / "run")
    one.began = True
    folder = Run(tmp_path / "run", False, (), None)  # type: ignore[arg-type]
    found = task.in_terms(RuntimeError("DefaultCPUAllocator: can't allocate memory"), one, folder)
    assert isinstance(found, RunFailed)
    assert re.search(said, str(found))
