"""Ranks agree: on what went wrong, on the checkpoint that they go on from, on what the cache holds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftrun.errors import RunFailed, UserError
from ftrun.runs import Run
from ftrun.tasks import keep
from ftrun.tasks import train as task
from ftrun.tasks.keep import Keeper
from ftrun.train import checkpoint
from ftrun.train.ranks import Ranks
from tests.jobs import tiny_job
from tests.ranks.pair import pair
from tests.train.test_checkpoint import sample


def keeper(folder: Path, base: str = "abc") -> Keeper:
    """One that keeps the checkpoints of a folder, of a base with this hash."""
    parts = SimpleNamespace(base=SimpleNamespace(hash=lambda: base, reference="base"))
    return Keeper(Run(folder, False, (), None), None, parts, None, lambda text: None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, "fingerprint", lambda corpus: "rows")


def test_what_one_rank_meets_ends_all_with_its_message() -> None:
    def work(ranks: Ranks) -> str:
        with ranks.together():
            pass
        with ranks.together():
            if ranks.rank == 1:
                raise UserError("the second has no data")
        return "went on"

    assert pair(work) == [[2, "the second has no data"]] * 2
    assert pair(lambda ranks: ranks.agree(RunFailed(f"of rank {ranks.rank}"))) == [[4, "of rank 0"]] * 2
    assert pair(lambda ranks: ranks.told(ranks.rank, by=1)) == [1, 1]


def resumed(here: Path, there: Path, base: str = "abc") -> list[Any]:
    """The step that each of two ranks goes on from, where they look into these folders."""

    def work(ranks: Ranks) -> int | None:
        found = keeper((here, there)[ranks.rank], ("abc", base)[ranks.rank]).found("auto", ranks)
        return found and found.progress.step

    return pair(work)


def test_the_first_rank_chooses_the_checkpoint(tmp_path: Path) -> None:
    one, other, empty = tmp_path / "one", tmp_path / "other", tmp_path / "empty"
    checkpoint.save(one / "checkpoints", sample(2))
    checkpoint.save(other / "checkpoints", sample(2))
    checkpoint.save(other / "checkpoints", sample(4))
    assert resumed(empty, empty) == [None, None]
    assert resumed(one, one) == [2, 2]
    assert resumed(one, other) == [2, 2]
    assert resumed(empty, one) == [None, None]


def test_a_rank_that_does_not_see_the_first_ones_checkpoint_ends_all(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    checkpoint.save(one / "checkpoints", sample(2))
    for said in resumed(one, tmp_path / "empty"):
        assert said[0] == 2
        assert "step-2: rank 1 on " in said[1]
        assert "does not see it (No such file" in said[1]
    changed = sample(2)
    changed.progress.tokens = 7
    checkpoint.save(other / "checkpoints", changed)
    assert all("sees another one than the first rank" in said[1] for said in resumed(one, other))
    assert all("has another base than the first rank" in said[1] for said in resumed(one, one, "xyz"))


def test_the_best_weights_are_taken_by_all_ranks_or_by_none(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "one/checkpoints", sample(2), "best")

    def work(ranks: Ranks) -> list[Any]:
        mine, taken = keeper(tmp_path / ("one", "empty")[ranks.rank]), []
        mine.load_trained = taken.append  # type: ignore[method-assign,assignment]
        return [mine.load_best(ranks), len(taken)]

    assert pair(work) == [[False, 0]] * 2


@pytest.mark.slow
def test_the_cache_is_what_the_first_rank_finds_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another job may write it between the looks of two ranks: the second is told that there was nothing."""
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))
    more = ("method=lora", "rank=4", "eval.retention=2", "eval.retention_tokens=4", "eval.max_new_tokens=0")

    def said(name: str) -> list[bool]:
        task.run(tiny_job(tmp_path, *more, "steps=1", f"out={tmp_path / name}"))
        text = " ".join(capsys.readouterr().out.split())
        return ["the base's figures on these rows, from the cache" in text, "(from the cache)" in text]

    assert said("one") == [False, False]
    assert said("two") == [True, True]
    kept = ({"ids", "loss", "tokens"}, {"step", "loss", "perplexity", "tokens", "seconds", "best", "extra"})
    monkeypatch.setattr(Ranks, "told", lambda self, value: None if value and set(value) in kept else value)
    assert said("three") == [False, False]
