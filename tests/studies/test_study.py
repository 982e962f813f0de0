"""What `ftrun -m …` reads: axes, search, launcher, the folder; what is no study."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ftrun.errors import UserError
from ftrun.studies.points import Points
from ftrun.studies.search.random import draws
from ftrun.studies.searching import grid
from ftrun.studies.study import Axis, as_value, label, read_study, record


def test_axes_in_hydras_syntax() -> None:
    study = read_study(
        ["method=lora,dora", "rank=choice(4,8)", "seed=range(0,3)", "lr=tag(log,interval(1e-5,1e-2))", "batch=8"]
    )
    assert [(a.key, a.points) for a in study.axes[:3]] == [
        ("method", ("lora", "dora")),
        ("rank", ("4", "8")),
        ("seed", ("0", "1", "2")),
    ]
    rate = study.axes[3]
    assert (rate.low, rate.high, rate.log, rate.is_interval, rate.integer) == (1e-5, 1e-2, True, True, False)
    assert study.fixed == ("batch=8",)
    assert read_study(["rank=int(interval(4,16))"]).axes[0].integer
    layers = read_study(["layers=first:10,last:10"])
    assert layers.axes[0].points == ("first:10", "last:10")
    job = Points(layers).make({"layers": "last:10"}).job
    assert job is not None
    assert job.method.options.layers == "last:10"


def test_every_combination_the_last_axis_fastest() -> None:
    study = read_study(["method=lora,dora", "rank=4,8"])
    assert list(grid(study.axes)) == [
        {"method": "lora", "rank": "4"},
        {"method": "lora", "rank": "8"},
        {"method": "dora", "rank": "4"},
        {"method": "dora", "rank": "8"},
    ]
    with pytest.raises(UserError, match="no points of its own"):
        list(grid(read_study(["lr=interval(1e-5,1e-2)"]).axes))


def test_the_same_command_has_the_same_folder_and_another_one_another() -> None:
    first = read_study(["rank=4,8", "lr=1e-3"])
    assert first.folder.parent == Path("studies")
    assert first.folder == read_study(["lr=1e-3", "rank=4,8,16"]).folder  # a larger grid goes on there
    assert first.folder != read_study(["rank=4,8", "lr=2e-3"]).folder
    assert read_study(["rank=4,8", "name=mine"]).folder == Path("studies/mine")
    assert read_study(["rank=4,8", "out=/tmp/a b"]).folder == Path("/tmp/a b")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["search=gird", "rank=4,8"], "Did you mean 'grid'"),
        (["launcher=lokal", "rank=4,8"], "Did you mean 'local'"),
        (["search=random", "search.trails=3", "rank=4,8"], "Did you mean 'trials'"),
        (["search=random", "trials=0", "rank=4,8"], "trials=0: expected an integer, 1 or more"),
        (["trials=3", "rank=4,8"], "search=grid has no such option"),
        (["search=grid,random", "rank=4,8"], "expected one search"),
        (["search=random", "trials=3,4", "rank=4,8"], "not swept"),
        (["search=random"], "nothing is swept"),
        (["name=a,b", "out=c", "rank=4,8", "launcher.workers=many"], "launcher.workers=many: expected auto"),
        (["lr=tag(log,interval(0,1))", "search=random"], "above 0"),
        (["lr=interval(2,1)", "search=random"], "the lower number first"),
    ],
)
def test_mistakes(typed: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        made(typed)


def made(typed: list[str]) -> object:
    """The search of a study."""
    study = read_study(typed)
    return study.search.load().Search(study.search.typed(), study.axes, study.fixed)


def test_another_study_in_the_folder_is_refused_with_the_difference(tmp_path: Path) -> None:
    record(read_study(["rank=4,8", "lr=1e-3", f"out={tmp_path}"]))
    record(read_study(["rank=4,8,16", "lr=1e-3", f"out={tmp_path}", "launcher.workers=2"]))
    with pytest.raises(UserError, match=r"(?s)another study lies there.*lr=1e-3.*lr=1e-4"):
        record(read_study(["rank=4,8", "lr=1e-4", f"out={tmp_path}"]))
    with pytest.raises(UserError, match="search"):
        record(read_study(["rank=4,8", "lr=1e-3", "search=random", f"out={tmp_path}"]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no study"):
        record(read_study(["rank=4,8", f"out={tmp_path / 'other'}"]))


def test_equal_jobs_share_a_key_and_places_do_not_count() -> None:
    points = Points(read_study(["method=lora,qlora", "quant=none,nf4", "optim=adamw", "checkpointing=none"]))
    one = points.make({"method": "lora", "quant": "nf4", "optim": "adamw"})
    other = points.make({"method": "qlora", "quant": "nf4", "optim": "adamw"})
    assert one.key == other.key
    assert one.key != points.make({"method": "lora", "quant": "none"}).key
    watched = Points(read_study(["log=wandb", "name=x", "save_every=5", "checkpointing=none"]))
    assert one.key == watched.make(dict(one.values)).key


def test_an_invalid_point_says_why() -> None:
    point = Points(read_study(["method=lora,full", "rank=4,8"])).make({"method": "full", "rank": "4"})
    assert point.job is None
    assert "method=full has no such option" in str(point.trouble)


def test_labels_and_values() -> None:
    assert label({"method": "dora", "rank": "8", "optim.lora_plus": "16"}) == "dora-rank8-lora_plus16"
    assert label({"data.path": "'a b.jsonl'"}) == "patha_b.jsonl"
    assert [as_value(v) for v in (1, 0.5, True, None, [3, 7], "q_proj", "re:a|b")] == [
        "1", "0.5", "true", "null", "[3,7]", "q_proj", "'re:a|b'",
    ]  # fmt: skip


def test_draws_are_those_of_the_seed_and_go_on_with_more_of_them() -> None:
    axes = [Axis("rank", ("4", "8", "16")), Axis("lr", low=1e-5, high=1e-2, log=True), Axis("k", low=1, high=9)]
    few, many = draws(axes, 5, 3), draws(axes, 9, 3)
    assert many[:5] == few
    assert len({tuple(p.items()) for p in many}) == 9
    assert all(1e-5 <= float(p["lr"]) <= 1e-2 and 1 <= int(p["k"]) <= 9 for p in many)
    assert draws([Axis("rank", ("4", "8"))], 5, 0) == draws([Axis("rank", ("4", "8"))], 2, 0)  # there are no more


def test_the_runs_of_a_study_are_a_group_at_wandb(tmp_path: Path) -> None:
    for more, group in ((), "mine"), (("log.group=ours",), "ours"):
        point = Points(read_study(["rank=4,8", "log=wandb", *more])).make({"rank": "4"})
        log = point.request(tmp_path / "mine" / "runs" / "one")["tree"]["log"]
        assert (log["group"], log["job_type"]) == (group, "trial")


def test_an_option_within_an_option_of_the_search() -> None:
    dotted = ["search.pruner=percentile", "search.pruner_options.percentile=50", "eval.every=5", "trials=3"]
    study = read_study(["search=optuna", "rank=4,8", *dotted])
    assert study.search.options.pruner_options == {"percentile": 50}
    with pytest.raises(UserError, match="pruner_optoins"):
        read_study(["search=optuna", "rank=4,8", "search.pruner_optoins.percentile=50"])
