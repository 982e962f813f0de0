"""A model in parts, seen by the first of two ranks that hear nothing of each other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ftrun import assemble
from ftrun.planning.sharing import pretended
from ftrun.runs import cache_dir
from ftrun.tasks.keep import Keeper
from tests.jobs import tiny_job


def test_weights_that_are_kept_whole_go_into_the_parts_of_a_model(tmp_path: Path) -> None:
    """As at the end of a run that hands over its best weights."""
    job = tiny_job(tmp_path, "method=full", "optim=adamw", "devices=2", "strategy=fsdp")
    parts = assemble.sketch(job, cache_dir(), print, whole=True)
    corpus = assemble.rows(job, parts, cache_dir(), print)
    assemble.furnish(job, parts, torch.device("cpu"), cache_dir(), print, recomputed=0)
    keeper = Keeper(SimpleNamespace(), job, parts, corpus, print)  # type: ignore[arg-type]
    best = {name: t.detach() + 1 for name, t in parts.tuner.state(parts.model).items()}
    with pretended(2) as (ranks, mesh):
        assemble.shared(job, parts, ranks, "fsdp", "cpu", mesh)
        keeper.load_trained(best)
        for name, trained in parts.tuner.named(parts.model).items():
            held = trained.parameter
            assert torch.equal(held.to_local(), best[name].chunk(2)[0])  # type: ignore[operator]


@pytest.mark.parametrize(("strategy", "place"), [("fsdp", "cpu"), ("ddp", "cuda")])
def test_what_is_sharded_is_not_read_to_a_device_that_it_may_not_fit_whole(strategy: str, place: str) -> None:
    assert assemble.filled_on(torch.device("cuda"), strategy).type == place
