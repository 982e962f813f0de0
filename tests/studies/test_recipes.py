"""Recipes that are studies, run: a part of their points, on a tiny base, a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftrun.groups import choices_of, study_of
from tests.jobs import tiny_base
from tests.studies.small import events, ftrun

ALWAYS = {"loss", "peak_bytes", "tokens_per_s", "trainable_params", "retention"}
# recipe -> which of its points run here, and the figures that it is about
SOME = {
    "layer-ablation": (["targets=attention,mlp", "layers=last:10"], set()),
    "rank-study": (["rank=1,2"], {"effective_rank"}),
    "compare-methods": (["method=lora,houlsby"], {"base_ms", "unmerged_ms", "merges"}),
}


def test_every_recipe_of_a_study_is_here() -> None:
    assert set(SOME) == {name for name in choices_of("recipe") if study_of(name)}


@pytest.mark.parametrize("name", SOME)
@pytest.mark.slow
def test_it_ends_with_the_figures_that_it_is_about(tmp_path: Path, name: str) -> None:
    base = tiny_base(tmp_path / "llama", num_hidden_layers=12, hidden_size=32, intermediate_size=64)
    points, wanted = SOME[name]
    few = ["steps=2", "batch=4", "data.topics=[ai]", "data.held_out=4", "device=cpu", "launcher.workers=1"]
    few += ["eval.latency=2"] if name == "compare-methods" else []
    done = ftrun(["-m", f"recipe={name}", f"model.path={base}", *few, *points, f"out={tmp_path / 'study'}"])
    assert done.returncode == 0, done.stdout + done.stderr
    ends = [event for event in events(tmp_path / "study") if event["event"] == "end"]
    assert [event["status"] for event in ends] == ["finished"] * 2, [event["reason"] for event in ends]
    for event in ends:
        assert {key for key, value in event["figures"].items() if value is not None} >= ALWAYS | wanted
