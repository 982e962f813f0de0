"""search=halving: the best of each rung go on, and nothing is trained twice."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from ftrun.errors import UserError
from ftrun.studies.ledger import Ledger
from ftrun.studies.rows import figures_of
from ftrun.studies.search.halving import ladder
from ftrun.studies.searching import Outcome, Search, Trial
from tests.studies.replaying import carry_on, made
from tests.studies.small import events, ftrun, typed

NINE = ("lr=1e-4,1e-3,1e-2", "rank=4,8,16")
JOB = ("search=halving", "steps=180", "search.first=20")


def loss_at(values: Mapping[str, str], step: int) -> float:
    """Planted: lr=1e-3 with rank=16 is the best from the first rung on."""
    off = abs(math.log10(float(values["lr"])) + 3) + 0.1 * abs(math.log2(int(values["rank"])) - 4)
    return 2.0 + off * (1 - math.exp(-step / 20)) + math.exp(-step / 50)


def judge(trial: Trial) -> Outcome:
    """A run that ends well, or is left where it was asked to be."""
    if trial.until is None:
        return Outcome("finished", None, {"loss": loss_at(trial.values, 180), "steps": 180})
    return Outcome("paused", None, {"rung_loss": loss_at(trial.values, trial.until), "steps": trial.until})


def all_of(search: Search, folder: Path) -> list[Trial]:
    ledger = Ledger(folder / "ledger.jsonl")
    try:
        return carry_on(search, ledger, judge)
    finally:
        ledger.close()


def test_the_steps_of_the_rungs() -> None:
    assert ladder(20, 3, 180) == [20, 60, 180]
    assert ladder(20, 3, 200) == [20, 60, 180, 200]
    assert ladder(5, 2, 6) == [5, 6]


def test_it_finds_the_planted_best_with_fewer_steps(tmp_path: Path) -> None:
    search = made([*JOB, *NINE])
    assert (len(search.points()), search.more, search.rungs) == (9, False, frozenset({20, 60}))
    trials = all_of(search, tmp_path)
    assert [t.until for t in trials] == [20] * 9 + [60] * 3 + [None]
    assert [dict(t.values) for t in trials[:9]] == [dict(p) for p in search.points()]
    assert dict(trials[-1].values) == {"lr": "0.001", "rank": "16"}
    best = sorted(search.points(), key=lambda p: loss_at(p, 20))[:3]
    assert [dict(t.values) for t in trials[9:12]] == [dict(p) for p in best]
    steps = 9 * 20 + 3 * (60 - 20) + (180 - 60)
    assert search.share == pytest.approx(steps / (9 * 180))
    (said,) = search.sentences([])
    assert said.startswith("Of 9 points 9 to step 20, 3 to step 60, 1 to step 180: ")
    assert f"{steps} steps in all, where training each to its end takes {9 * 180} ({steps / 16.2:.0f}%)" in said
    assert [t.number for t in trials] == list(range(13))


def test_nothing_is_asked_for_before_a_rung_is_whole() -> None:
    """Several workers: the last of a rung holds the next one up."""
    search = made([*JOB, *NINE])
    assert search.left == pytest.approx(search.share)
    asked = [search.ask() for _ in range(9)]
    assert search.ask() is None
    for trial in reversed(asked[1:]):
        assert trial is not None
        search.tell(trial, judge(trial))
        assert search.ask() is None
    assert asked[0] is not None
    search.tell(asked[0], judge(asked[0]))
    assert search.left == pytest.approx((3 * (60 - 20) + 180 - 60) / (9 * 180))
    following = search.ask()
    assert following is not None
    assert following.until == 60
    assert search.left == pytest.approx((3 * (60 - 20) + 180 - 60) / (9 * 180))


def test_of_equal_ones_the_first_goes_on(tmp_path: Path) -> None:
    search = made(["search=halving", "steps=40", "search.first=10", "search.factor=2", "rank=4,8,16,32"])

    def equal(trial: Trial) -> Outcome:
        return Outcome("paused" if trial.until else "finished", None, {"rung_loss": 1.0, "loss": 1.0, "steps": 40})

    ledger = Ledger(tmp_path / "ledger.jsonl")
    trials = carry_on(search, ledger, equal)
    assert [(t.values["rank"], t.until) for t in trials] == [
        ("4", 10), ("8", 10), ("16", 10), ("32", 10), ("4", 20), ("8", 20), ("4", None),
    ]  # fmt: skip


def test_points_that_end_badly_drop_out_and_the_rest_goes_on(tmp_path: Path) -> None:
    search = made([*JOB, *NINE])
    bad = {
        ("0.001", "16"): Outcome("diverged", "step 7: not finite", {"steps": 6}),
        ("0.001", "8"): Outcome("does_not_fit", "too large"),
        ("0.001", "4"): Outcome("paused", None, {"steps": 20}),  # nothing was measured
        ("0.01", "4"): Outcome("invalid", "no job"),
        ("0.01", "8"): Outcome("failed", "the worker died: SIGKILL", {}),
    }

    def some_bad(trial: Trial) -> Outcome:
        if trial.until == 60 and trial.values["lr"] == "0.01":
            return Outcome("diverged", "step 31: not finite", {"steps": 30})
        return bad.get((trial.values["lr"], trial.values["rank"])) or judge(trial)

    trials = carry_on(search, Ledger(tmp_path / "ledger.jsonl"), some_bad)
    second = {(t.values["lr"], t.values["rank"]) for t in trials if t.until == 60}
    assert len(second) == 3  # a third of those that began
    assert not second & set(bad)
    assert ("0.01", "16") in second
    (last,) = [t for t in trials if t.until is None]
    assert last.values == {"lr": "0.0001", "rank": "16"}
    first, unjudged = search.sentences([])
    trained = 6 + 20 + 30 + 60 + 180 + 20  # diverged, unmeasured, diverged later, second, best, left at the first rung
    whole = 6 + 180 + 30 + 3 * 180
    assert f"{trained} steps in all, where training each to its end takes {whole} " in first
    assert unjudged == "1 had no held-out loss at their rung, and went no further"


def test_where_all_end_badly_it_ends(tmp_path: Path) -> None:
    search = made([*JOB, *NINE])
    trials = carry_on(search, Ledger(tmp_path / "ledger.jsonl"), lambda t: Outcome("failed", "no"))
    assert len(trials) == 9
    assert search.ask() is None
    assert search.sentences([]) == []


def test_a_run_that_ended_early_by_itself_counts_with_its_loss(tmp_path: Path) -> None:
    search = made(["search=halving", "steps=40", "search.first=10", "search.factor=2", "rank=4,8"])

    def patient(trial: Trial) -> Outcome:
        if trial.values["rank"] == "8":
            return Outcome("finished", None, {"loss": 0.5, "steps": 7})
        return Outcome("paused", None, {"rung_loss": 1.0, "steps": trial.until})

    trials = carry_on(search, Ledger(tmp_path / "ledger.jsonl"), patient)
    assert [(t.values["rank"], t.until) for t in trials] == [("4", 10), ("8", 10), ("8", None)]
    assert "17 steps in all, where training each to its end takes 47 " in search.sentences([])[0]


def test_one_point_alone_goes_to_the_end(tmp_path: Path) -> None:
    search = made([*JOB, *NINE, "trials=1"])
    assert [t.until for t in all_of(search, tmp_path)] == [None]
    assert search.share == 1.0


def test_points_drawn_at_random_are_those_of_the_random_search() -> None:
    axes = ("lr=tag(log,interval(1e-5,1e-2))", "rank=4,8,16", "trials=7", "search.seed=3")
    assert made([*JOB, *axes]).points() == made(["search=random", *axes]).points()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["search=halving", *NINE], "needs steps=N"),
        (["search=halving", "epochs=2", *NINE], "needs steps=N"),
        ([*JOB, "eval=none", *NINE], "eval=none measures none"),
        (["search=halving", "steps=20", *NINE], "search.first=20: expected fewer than steps=20"),
        (["search=halving", "steps=100,200", "rank=4,8"], "steps cannot be swept"),
        ([*JOB, "lr=interval(1e-5,1e-2)"], "say how many to draw: trials=N"),
        ([*JOB, "search.factor=1", *NINE], "search.factor=1: expected an integer, 2 or more"),
        ([*JOB, "search.facter=2", *NINE], "Did you mean 'factor'"),
        ([*JOB, "rank=4"], "nothing is swept"),
    ],
)
def test_mistakes(typed: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        made(typed)
    assert said in str(caught.value)


def test_the_steps_may_come_from_a_job_file(tmp_path: Path) -> None:
    from ftrun.compose import compose
    from ftrun.runs import open_run

    run = open_run(tmp_path / "run", compose(["steps=90"]).as_dict(), "never")
    run.release()
    assert made(["search=halving", f"job={tmp_path / 'run' / 'job.yaml'}", "rank=4,8,16"]).rungs == {20, 60}


def test_a_run_that_was_left_tells_the_loss_of_that_step(tmp_path: Path) -> None:
    result = {"status": "interrupted", "steps": 20, "eval": {"before": {"loss": 9.0}}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    rows = [{"step": step, "loss": loss} for step, loss in ((0, 9.0), (10, 5.0), (20, 4.0))]
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert figures_of(tmp_path, until=20)["rung_loss"] == 4.0
    assert figures_of(tmp_path, until=10)["rung_loss"] == 5.0
    assert "rung_loss" not in figures_of(tmp_path, until=15)
    assert figures_of(tmp_path)["rung_loss"] == 4.0  # stopped on the way by a pruner
    (tmp_path / "result.json").write_text(json.dumps({**result, "status": "finished"}))
    assert "rung_loss" not in figures_of(tmp_path)
    (tmp_path / "evals.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert "rung_loss" not in figures_of(tmp_path)  # the untuned base's is none


@pytest.mark.slow
def test_real_jobs_climb_and_the_winner_is_what_it_is_alone(tmp_path: Path) -> None:
    command = typed(
        tmp_path, "search=halving", "steps=8", "search.first=2", "search.factor=2", "rank=2,4", "lr=1e-5,2e-2",
    )  # fmt: skip
    done = ftrun(command)
    assert done.returncode == 0, done.stderr
    study = tmp_path / "study"
    asked = [(e["values"]["lr"], e["until"]) for e in events(study) if e["event"] == "trial"]
    assert [until for _, until in asked] == [2] * 4 + [4] * 2 + [None]
    assert {lr for lr, until in asked if until != 2} == {"0.02"}  # the other rate learns nothing
    assert (
        "4 to step 2, 2 to step 4, 1 to step 8: 16 steps in all, where training each to its end takes 32" in done.stdout
    )

    (run,) = [p.parent for p in (study / "runs").glob("*/adapter")]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(1, 9))  # left twice, and nothing trained twice
    alone = ftrun([f"job={run / 'job.yaml'}", f"out={tmp_path / 'alone'}"])
    assert alone.returncode == 0, alone.stderr
    same = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["lr"], r["loss"]) for r in steps] == [(r["lr"], r["loss"]) for r in same]
    winner = next(e for e in events(study) if e["event"] == "end" and e["status"] == "finished")
    assert winner["figures"]["peak_bytes"] > 0

    before = (study / "ledger.jsonl").read_text()
    again = ftrun(command)
    assert again.returncode == 0, again.stderr
    assert (study / "ledger.jsonl").read_text() == before  # all of it is known
