"""Each rank's generators: streams of their own, saved for all, set back where there are as many again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ftrun.optim.state import of_all
from ftrun.tasks import keep
from ftrun.tasks import train as task
from ftrun.train.generators import random_state, restore_of_each, seed_rank
from ftrun.train.ranks import Ranks
from tests.jobs import tiny_job


def drawn() -> float:
    return float(torch.rand(()))


def test_no_two_ranks_or_steps_draw_the_same() -> None:
    made = []
    for place in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)):
        seed, step, rank = place
        seed_rank(seed, step, Ranks(rank, 2))
        made.append(drawn())
    assert len(set(made[:4])) == 4
    assert made[4] == made[0]


def test_a_rank_gets_its_own_back_and_nothing_is_set_where_they_are_not_as_many() -> None:
    states, after = [], []
    for rank in range(2):
        seed_rank(0, 0, Ranks(rank, 2))
        states.append(random_state())
        after.append(drawn())
    saved = of_all(states)
    for rank in (1, 0):
        assert restore_of_each(saved, Ranks(rank, 2))
        assert drawn() == after[rank]
    before = torch.get_rng_state()
    assert not restore_of_each(saved, Ranks())
    assert not restore_of_each(saved, Ranks(0, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_that_cannot_draw_on_as_before_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(keep, "restore_of_each", lambda states, ranks: False)
    for steps in (1, 2):
        task.run(tiny_job(tmp_path, "method=lora", "eval=none", "dropout=0.1", f"steps={steps}"))
    assert "another number of devices than 1: dropout draws other masks" in capsys.readouterr().out
