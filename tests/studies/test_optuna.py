"""search=optuna: Optuna itself, asked and told, on objectives whose answer is known."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("optuna", reason="pip install 'ftrun[optuna]'")

from ftrun.errors import UserError
from ftrun.studies.ledger import Ledger
from ftrun.studies.searching import OBJECTIVES, Outcome, Trial
from tests.studies.replaying import begin, carry_on, gone_on, made, told
from tests.studies.small import events, ftrun, kill_all, started, typed, wait_for

AXES = ("lr=tag(log,interval(1e-5,1e-2))", "rank=4,8,16,32", "method=lora,dora")
TWO = "search.objectives=[loss,peak_bytes]"
EVOLVED = (TWO, "search.sampler=nsgaii", "search.sampler_options={population_size: 4}")
PRUNED = ("search.pruner=median", "search.startup=4", "eval.every=10", "steps=100")


def loss_of(values: Mapping[str, str]) -> float:
    """Lowest at lr=1e-3 and rank=16; the method hardly matters."""
    off = abs(math.log10(float(values["lr"])) + 3)
    return 2.0 + off + 0.1 * abs(math.log2(int(values["rank"])) - 4) + 0.001 * (values["method"] == "dora")


def judge(trial: Trial) -> Outcome:
    """Some go wrong: rates above 5e-3 diverge, rank=32 with DoRA does not fit."""
    if float(trial.values["lr"]) > 5e-3:
        return Outcome("diverged", "step 3: loss nan: not finite")
    if trial.values["rank"] == "32" and trial.values["method"] == "dora":
        return Outcome("does_not_fit", "too large")
    return Outcome("finished", None, {"loss": loss_of(trial.values), "peak_bytes": int(trial.values["rank"]) * 10**6})


def curve(values: Mapping[str, str], step: int) -> float:
    """On the way there: falling, and at the smallest rank rising again."""
    return loss_of(values) + 3.0 * math.exp(-step / 30) + (0.05 * max(0, step - 50) if values["rank"] == "4" else 0.0)


def whole(folder: Path, *typed: str) -> list[Trial]:
    """All trials of a study that nothing interrupts."""
    ledger = Ledger(folder / "ledger.jsonl")
    return carry_on(made(["search=optuna", *typed]), ledger, judge, curve)


def rows_of(trials: list[Trial]) -> list[dict[str, object]]:
    """As the study's table would have them."""
    ends = [(t, judge(t)) for t in trials]
    return [
        {"number": t.number + 1, "values": dict(t.values), "status": o.status, "figures": dict(o.figures)}
        for t, o in ends
    ]


@pytest.mark.parametrize("more", [(TWO,), (), EVOLVED, PRUNED, (*PRUNED[1:], "search.pruner=hyperband")], ids=str)
def test_a_study_cut_in_the_middle_goes_on_as_if_it_never_was(tmp_path: Path, more: tuple[str, ...]) -> None:
    typed = ("search=optuna", "trials=20", *AXES, *more)
    unbroken = whole(tmp_path / "whole", "trials=20", *AXES, *more)
    assert len(unbroken) == 20

    first = carry_on(made(typed), Ledger(tmp_path / "cut" / "ledger.jsonl"), judge, curve, ends=7)
    search, ledger, open_trials = gone_on(tmp_path / "cut", typed)
    assert not open_trials
    second = carry_on(search, ledger, judge, curve, ends=6)
    search, ledger, open_trials = gone_on(tmp_path / "cut", typed)
    third = carry_on(search, ledger, judge, curve)
    assert told([*first, *second, *third]) == told(unbroken)
    assert search.ask() is None
    assert _told(tmp_path / "cut") == _told(tmp_path / "whole")


def _told(folder: Path) -> list[dict[str, object]]:
    kept = ("event", "number", "values", "step", "loss", "go", "status")
    return [{k: e[k] for k in kept if k in e} for e in Ledger(folder / "ledger.jsonl").events]


@pytest.mark.parametrize("rungs", [0, 3, 9])
def test_a_trial_that_was_cut_off_is_tried_again_and_not_drawn_anew(tmp_path: Path, rungs: int) -> None:
    typed = ("search=optuna", "trials=14", *AXES, *PRUNED)
    unbroken = whole(tmp_path / "whole", *typed[1:])
    search, ledger = made(typed), Ledger(tmp_path / "cut" / "ledger.jsonl")
    first = carry_on(search, ledger, judge, curve, ends=9)
    cut = search.ask()
    assert cut is not None
    begin(ledger, cut)
    go = True
    for step in range(10, 10 + 10 * rungs, 10):  # some of its evaluations were heard, and the process died
        go = search.verdict(cut, step, curve(cut.values, step))
        ledger.add("rung", number=cut.number, step=step, loss=curve(cut.values, step), go=go)
        if not go:
            break
    search, ledger, again = gone_on(tmp_path / "cut", typed)
    assert told(again) == (told([cut]) if go else [])  # one that was stopped is not begun again
    rest = carry_on(search, ledger, judge, curve, first=again)
    assert told([*first, *([] if go else [cut]), *rest]) == told(unbroken)


def test_the_same_seed_draws_the_same_and_another_one_otherwise(tmp_path: Path) -> None:
    one, other = (told(whole(tmp_path / name, "trials=15", *AXES)) for name in ("one", "other"))
    assert one == other
    assert told(whole(tmp_path / "seed", "trials=15", *AXES, "search.seed=1")) != one
    more = told(whole(tmp_path / "more", "trials=18", *AXES))
    assert more[:15] == one  # a study that is given more trials goes on


def test_it_learns(tmp_path: Path) -> None:
    """What is drawn after the first third lies nearer to the best than what was drawn at random."""
    trials = whole(tmp_path, "trials=40", *AXES)
    losses = [loss_of(t.values) for t in trials]
    late = sorted(losses[20:])[10]
    assert late < sorted(losses[:10])[5] - 0.2
    best = min(trials, key=lambda t: loss_of(t.values))
    assert best.values["rank"] == "16"
    assert 3e-4 < float(best.values["lr"]) < 3e-3


def test_pruning_stops_trials_early_and_not_the_best_one(tmp_path: Path) -> None:
    trials = whole(tmp_path, "trials=20", *AXES, *PRUNED)
    ends = [e for e in Ledger(tmp_path / "ledger.jsonl").events if e["event"] == "end"]
    pruned = [e for e in ends if e["status"] == "pruned"]
    assert len(pruned) >= 4
    assert all(e["figures"]["steps"] < 100 for e in pruned)
    assert all(e["number"] >= 4 for e in pruned)  # none before there is anything to compare it with
    best = min((t for t in trials if judge(t).status == "finished"), key=lambda t: loss_of(t.values))
    assert best.number not in {e["number"] for e in pruned}


@pytest.mark.parametrize("pruner", ["halving", "hyperband", "percentile", "patient", "threshold", "SuccessiveHalving"])
def test_every_pruner_by_its_name(tmp_path: Path, pruner: str) -> None:
    options = {
        "percentile": "{percentile: 30.0}",
        "patient": "{patience: 0, wrapped_pruner: median}",
        "threshold": "{upper: 5.0}",
    }
    more = [f"search.pruner_options={options[pruner]}"] if pruner in options else []
    whole(tmp_path, "trials=20", *AXES, f"search.pruner={pruner}", "eval.every=10", *more)
    statuses = [e["status"] for e in Ledger(tmp_path / "ledger.jsonl").events if e["event"] == "end"]
    assert 0 < statuses.count("pruned") < 20


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsgaii", "nsga-iii", "cmaes", "qmc", "gp", "TPESampler"])
def test_every_sampler_by_its_name_or_the_package_that_it_needs(tmp_path: Path, sampler: str) -> None:
    needs = {"cmaes": "cmaes", "qmc": "scipy", "gp": "scipy"}.get(sampler)
    typed = (
        "trials=8",
        "lr=tag(log,interval(1e-5,1e-2))",
        "rank=4,8,12,16",
        "method=lora,dora",
        f"search.sampler={sampler}",
    )
    if needs and importlib.util.find_spec(needs) is None:
        with pytest.raises(UserError, match=f"search.sampler={sampler} needs the package {needs}.*pip install {needs}"):
            made(["search=optuna", *typed])
        return
    one, other = (told(whole(tmp_path / name, *typed)) for name in ("one", "other"))
    assert one == other
    assert len({v["lr"] for _, v, _ in one}) > 1


def test_brute_force_ends_where_everything_was_tried(tmp_path: Path) -> None:
    axes = ("lr=1e-4,1e-3", "rank=4,8,12,16", "method=lora,dora")
    trials = whole(tmp_path, "trials=40", *axes, "search.sampler=bruteforce")
    assert len(trials) == len({tuple(t.values.items()) for t in trials}) == 16


def test_several_objectives_end_in_a_front_and_in_what_mattered(tmp_path: Path) -> None:
    search = made(["search=optuna", "trials=30", *AXES, TWO])
    trials = carry_on(search, Ledger(tmp_path / "ledger.jsonl"), judge)
    rows = rows_of(trials)
    front, *mattered = search.sentences(rows)
    numbers = {int(n) for n in front.rpartition("rows ")[2].split(", ")}
    good = {r["number"]: r["figures"] for r in rows if r["status"] == "finished"}
    assert numbers
    assert numbers < set(good)
    for number, mine in good.items():
        beaten = any(
            theirs["loss"] <= mine["loss"] and theirs["peak_bytes"] <= mine["peak_bytes"] and theirs != mine
            for theirs in good.values()
        )
        assert (number in numbers) == (not beaten)
    by = {line.split()[3].rstrip(","): line for line in mattered}
    assert set(by) == {"loss", "peak_bytes"}
    assert by["loss"].partition("): ")[2].startswith("lr ")
    assert by["peak_bytes"].partition("): ")[2].startswith("rank ")


def test_speed_is_better_where_it_is_higher(tmp_path: Path) -> None:
    search = made(["search=optuna", "trials=25", "rank=range(1,65)", "search.objectives=[tokens_per_s]"])

    def speed(trial: Trial) -> Outcome:
        return Outcome("finished", None, {"tokens_per_s": 1000 - abs(50 - int(trial.values["rank"]))})

    trials = carry_on(search, Ledger(tmp_path / "ledger.jsonl"), speed)
    assert all(t.values["rank"].isdigit() for t in trials)
    best = min(trials, key=lambda t: abs(50 - int(t.values["rank"])))
    rows = [
        {"number": t.number + 1, "values": t.values, "status": "finished", "figures": speed(t).figures} for t in trials
    ]
    assert search.sentences(rows)[0].endswith(
        f"row {best.number + 1}'s (rank={best.values['rank']}): {speed(best).figures['tokens_per_s']}"
    )
    assert sum(abs(50 - int(t.values["rank"])) for t in trials[15:]) < sum(
        abs(50 - int(t.values["rank"])) for t in trials[:10]
    )


def test_a_run_without_the_figure_fails_and_the_end_says_so(tmp_path: Path) -> None:
    search = made(["search=optuna", "trials=5", *AXES, TWO])

    def without(trial: Trial) -> Outcome:
        return Outcome("finished", None, {"peak_bytes": 5, "loss": None if trial.number % 2 else float("nan")})

    assert len(carry_on(search, Ledger(tmp_path / "ledger.jsonl"), without)) == 5
    assert search.sentences([]) == ["5 finished trials have no loss: to Optuna they count as failed"]


def test_a_figure_of_nought_is_one(tmp_path: Path) -> None:
    search = made(["search=optuna", "trials=3", *AXES, "search.objectives=[retention]"])
    carry_on(search, Ledger(tmp_path / "ledger.jsonl"), lambda t: Outcome("finished", None, {"retention": 0.0}))
    assert [trial.value for trial in search.study.trials] == [0.0] * 3
    assert (
        "0" in search.sentences([{"status": "finished", "figures": {"retention": 0.0}, "values": {}, "number": 1}])[0]
    )


def test_points_that_are_certain_are_those_that_come(tmp_path: Path) -> None:
    search = made(["search=optuna", "trials=14", *AXES])
    assert (len(search.points()), search.more) == (10, True)
    trials = carry_on(search, Ledger(tmp_path / "ledger.jsonl"), judge)
    assert [dict(p) for p in search.points()] == [dict(t.values) for t in trials[:10]]
    drawn = made(["search=optuna", "trials=14", *AXES, "search.sampler=random"])
    assert (len(drawn.points()), drawn.more) == (14, False)
    assert made(["search=optuna", "trials=14", *AXES, "search.sampler=nsgaii"]).points() == []


def test_values_come_back_as_they_were_typed(tmp_path: Path) -> None:
    typed = [
        "search=optuna", "trials=30", "dropout=0.3,0.1,0.2", "rank=int(interval(3,9))", "batch=8,24,16",
        "seed=tag(log,int(interval(1,1000)))", "lr=1e-4,1e-3", "method.rslora=true,false",
    ]  # fmt: skip
    search = made(typed)
    kinds = {k: (type(d).__name__, getattr(d, "step", None), getattr(d, "log", None)) for k, d in search._space.items()}
    assert kinds["dropout"] == ("FloatDistribution", 0.1, False)
    assert kinds["rank"] == ("IntDistribution", 1, False)
    assert kinds["batch"] == ("IntDistribution", 8, False)
    assert kinds["seed"] == ("IntDistribution", 1, True)
    assert kinds["lr"][0] == kinds["method.rslora"][0] == "CategoricalDistribution"
    assert made(["search=optuna", "rank=4,8,16"])._space["rank"].choices == ("4", "8", "16")
    trials = carry_on(search, Ledger(tmp_path / "ledger.jsonl"), lambda t: Outcome("finished", None, {"loss": 1.0}))
    assert {t.values["dropout"] for t in trials} == {"0.3", "0.1", "0.2"}
    assert {t.values["batch"] for t in trials} == {"8", "16", "24"}
    assert {int(t.values["rank"]) for t in trials} <= set(range(3, 10))
    assert all(1 <= int(t.values["seed"]) <= 1000 for t in trials)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["search.sampler=tep"], "search.sampler=tep: the sampler 'tep' is unknown. Did you mean 'tpe'?"),
        (["search.sampler=grid"], "the sampler 'grid' is unknown"),
        (["search.pruner=medain", "eval.every=5"], "Did you mean 'median'?"),
        (["search.objectives=[los]"], "Did you mean 'loss'?"),
        (["search.objectives=[]"], "expected one or more names"),
        (["search.objectives=[loss,loss]"], "each once"),
        (["search.sampler_options={multivariat: true}"], "Did you mean 'multivariate'?"),
        (["search.sampler_options={seed: 3}"], "the option 'seed' is unknown"),
        (["search.sampler=nsgaii", "search.sampler_options={population_size: 1}"], "population_size"),
        (["search.pruner_options={percentile: 3}"], "pruner=none has none"),
        (["search.pruner=percentile", "eval.every=5"], "needs 'search.pruner_options={percentile: …}'"),
        (["search.pruner=median"], "add eval.every=STEPS"),
        (["search.pruner=median", "eval.every=5", TWO], "search.objectives=[loss]"),
        (["search.pruner=median", "eval.every=5", "search.objectives=[seconds]"], "search.objectives=[loss]"),
        (["search.sampler=random", "search.startup=3"], "search.startup=3: neither sampler=random nor pruner=none"),
        (["search.sampler=bruteforce"], "step"),
        (["eval=none"], "eval=none measures none"),
        (["lr=1e-4,1e-3", "search.sampler=cmaes"], "cmaes searches numbers alone"),
        (["trials=0"], "trials=0: expected an integer, 1 or more"),
    ],
)
def test_mistakes(typed: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        made(["search=optuna", *AXES, *typed])
    assert said in str(caught.value)


def test_nothing_swept_is_a_mistake() -> None:
    with pytest.raises(UserError, match="nothing is swept"):
        made(["search=optuna", "rank=8"])


def test_swept_evaluations_are_enough_for_a_pruner() -> None:
    assert made(["search=optuna", "search.pruner=median", "eval.every=5,10", "rank=4,8"]).ask() is not None


def test_optuna_itself_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        search, ledger = made(["search=optuna", "trials=12", *AXES, *PRUNED]), Ledger(tmp_path / "ledger.jsonl")
        carry_on(search, ledger, judge, curve)
        search.sentences([])
        ledger.close()
    assert not [str(one.message) for one in caught]
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("optuna").level == logging.CRITICAL


def test_every_objective_is_taken() -> None:
    assert made(["search=optuna", "rank=4,8", f"search.objectives=[{','.join(OBJECTIVES)}]"]).ask() is not None


@pytest.mark.slow
def test_real_jobs_killed_in_the_middle_go_on_with_the_same_trials(tmp_path: Path) -> None:
    axes = ("search=optuna", "trials=7", "search.startup=3", TWO, "lr=tag(log,interval(1e-4,1e-1))", "rank=2,4,8")
    unbroken = ftrun(typed(tmp_path, *axes, f"out={tmp_path / 'whole'}"))
    assert unbroken.returncode == 0, unbroken.stderr
    assert "Pareto front of loss and peak_bytes" in unbroken.stdout

    command = typed(tmp_path, *axes, f"out={tmp_path / 'killed'}")
    process = started(command, tmp_path / "log")
    wait_for(lambda: sum(e["event"] == "end" for e in events(tmp_path / "killed")) >= 4)
    kill_all(process)
    done = ftrun(command)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout
    assert _came_to(tmp_path / "killed") == _came_to(tmp_path / "whole")


@pytest.mark.slow
def test_real_jobs_are_stopped_by_a_pruner(tmp_path: Path) -> None:
    """A threshold that only the larger rate gets under."""
    rates = ("lr=1e-6,3e-2", "search.sampler=bruteforce", "trials=2", "steps=8", "eval.every=4")
    done = ftrun(
        typed(tmp_path, "search=optuna", *rates, "search.pruner=threshold", "search.pruner_options={upper: 5.9}")
    )
    assert done.returncode == 0, done.stderr
    ends = {e["figures"]["steps"]: e for e in events(tmp_path / "study") if e["event"] == "end"}
    assert {steps: e["status"] for steps, e in ends.items()} == {4: "pruned", 8: "finished"}
    assert ends[4]["figures"]["rung_loss"] > 5.9
    assert ends[8]["figures"]["loss"] < 5.9


def _came_to(folder: Path) -> list[tuple[object, ...]]:
    found = events(folder)
    ends = {e["number"]: e for e in found if e["event"] == "end"}
    return [
        (e["number"], e["values"], ends[e["number"]]["status"], ends[e["number"]]["figures"]["loss"])
        for e in found
        if e["event"] == "trial"
    ]


def test_a_mistake_in_what_all_trials_share_is_told_at_once(tmp_path: Path) -> None:
    done = ftrun(typed(tmp_path, "search=optuna", *AXES, "batch=0"))
    assert (done.returncode, "batch=0: expected an integer, 1 or more" in done.stderr) == (2, True)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(("seed", "fits"), [(0, {True, False}), (4, {False})])
@pytest.mark.few(1)
def test_the_plan_shows_the_draws_that_are_certain(tmp_path: Path, seed: int, fits: set[bool]) -> None:
    """Some of them are no jobs, or all of them: nobody refuses the rest for it."""
    axes = ("rank=2,4", "method=houlsby,lora", "search.startup=3", "trials=6", f"search.seed={seed}")
    done = ftrun(["plan", "format=json", *typed(tmp_path, "search=optuna", *axes)])
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["points"], plan["more"]) == (3, True)
    assert {row["fits"] for row in plan["rows"]} == fits
