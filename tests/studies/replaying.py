"""A search at work without jobs: it is asked and told, and what happens goes on a real ledger as the driver has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftrun.studies.driver import Driver
from ftrun.studies.ledger import Ledger
from ftrun.studies.searching import Outcome, Search, Trial
from ftrun.studies.study import Study, read_study

Judge = Callable[[Trial], Outcome]
Curve = Callable[[Mapping[str, str], int], float]  # values, step -> held-out loss


def made(typed: Sequence[str], folder: Path | None = None) -> Search:
    """The search of a command line."""
    return search_of(read_study([*typed, *([f"out={folder}"] if folder else [])]))


def search_of(study: Study) -> Search:
    found: Search = study.search.load().Search(study.search.typed(), study.axes, study.fixed)
    return found


def carry_on(
    search: Search,
    ledger: Ledger,
    judge: Judge,
    curve: Curve | None = None,
    ends: int = 1000,
    first: Sequence[Trial] = (),
) -> list[Trial]:
    """Do what the search asks for, one trial after the other, until it has nothing more or `ends` have ended.

    curve: what its trials that ask hear at every tenth step before the hundredth. first: trials that were begun before.
    """
    done: list[Trial] = []
    waiting = list(first)
    while len(done) < ends:
        trial = waiting.pop(0) if waiting else search.ask()
        if trial is None:
            break
        if trial not in first:
            begin(ledger, trial)
        outcome = _trained(search, ledger, trial, judge, curve)
        fields = {"status": outcome.status, "reason": outcome.reason, "figures": dict(outcome.figures)}
        ledger.add("end", number=trial.number, key=_key(trial), until=trial.until, **fields)
        search.tell(trial, outcome)
        done.append(trial)
    return done


def begin(ledger: Ledger, trial: Trial) -> None:
    """The trial on record."""
    ledger.add(
        "trial",
        number=trial.number,
        row=trial.number + 1,
        key=_key(trial),
        values=dict(trial.values),
        until=trial.until,
        kind=trial.kind,
        note="",
        folder=_key(trial),
    )


def gone_on(folder: Path, typed: Sequence[str]) -> tuple[Search, Ledger, list[Trial]]:
    """The study in a folder as a new process finds it: the search told again by the driver, the trials still open."""
    study = read_study([*typed, f"out={folder}"])
    search, ledger, said = search_of(study), Ledger(folder / "ledger.jsonl"), list[str]()
    launcher = study.launcher.load().Launcher(study.launcher.typed(), folder)
    try:
        driver = Driver(study, search, launcher, ledger, said.append)
    finally:
        launcher.close()
    assert all(text.endswith(": pruned") for text in said), said  # those that a verdict had stopped end at once
    return search, ledger, driver._again


def _trained(search: Search, ledger: Ledger, trial: Trial, judge: Judge, curve: Curve | None) -> Outcome:
    for step in range(10, 100, 10) if curve and trial.asks else ():
        loss = curve(trial.values, step)
        go = search.verdict(trial, step, loss)
        ledger.add("rung", number=trial.number, key=_key(trial), step=step, loss=loss, go=go)
        if not go:
            return Outcome("pruned", None, {"rung_loss": loss, "steps": step})
    return judge(trial)


def _key(trial: Trial) -> str:
    return "-".join(f"{key}{value}" for key, value in trial.values.items())


def told(trials: Sequence[Trial]) -> list[tuple[int, dict[str, str], Any]]:
    """Trials as they compare."""
    return [(t.number, dict(t.values), t.until) for t in trials]
