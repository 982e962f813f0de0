"""`ftrun -m …` and `ftrun plan -m …`: a study from its command line to its table and page."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftrun.errors import DoesNotFit, Interrupted, RunFailed, UserError
from ftrun.lock import Lock
from ftrun.runs import aside, tidy
from ftrun.secrets import hidden, hide
from ftrun.studies import found
from ftrun.studies.driver import Driver
from ftrun.studies.gathered import linked
from ftrun.studies.launching import Launcher
from ftrun.studies.ledger import Ledger
from ftrun.studies.points import Point, Points
from ftrun.studies.rows import rows_of
from ftrun.studies.searching import Search
from ftrun.studies.study import Study, read_study, record

Say = Callable[[str], None]
_LISTED = 5  # points that are no jobs, told one by one
_SURE = 8  # points of a search with more to ask for that are enough to blame what all of them share


def run(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> int:
    """Run the study, or go on with it; 0 where it came to its end with at least one point done."""
    study = read_study(overrides, config_dirs)
    search = _search(study)
    _check(study, search)
    try:
        return _carry_out(study, search)
    except BrokenPipeError:  # a reader that has left
        raise
    except OSError as error:
        place, why = error.filename or study.folder, error.strerror or error
        raise RunFailed(f"{place}: {why}. The same command goes on with the study") from error


def _carry_out(study: Study, search: Search) -> int:
    with _at_work(study, search, _say) as driver:
        driver.plan()
        for line in _outlook(driver):
            _say(line)
        try:
            driver.run()
        except KeyboardInterrupt as stop:
            rows = _report(driver)
            done = sum(r["status"] == "finished" for r in rows)
            raise Interrupted(f"interrupted: {done} of {len(rows)} done; the same command goes on") from stop
        rows = _report(driver)
        return _show(driver, rows)


def plan(overrides: Sequence[str], config_dirs: Sequence[Path] = (), format: str = "text") -> int:
    """What the study would take: each point's peak and time, and all of them together. Writes nothing but the cache."""
    import tempfile

    study = read_study(overrides, config_dirs)
    search = _search(study)
    _check(study, search)
    with tempfile.TemporaryDirectory(prefix="ftrun-plan-") as nowhere:
        # its device is what the launcher's first plan finds here
        launcher = study.launcher.load().Launcher(study.launcher.typed(), Path(nowhere))
        ledger = Ledger(Path(nowhere) / "ledger.jsonl")
        driver = Driver(study, search, launcher, ledger, lambda text: print(hide(text), file=sys.stderr))
        try:
            driver.plan(whole=False)
        finally:
            launcher.close()
            ledger.close()
    rows = [_planned(driver, number, values) for number, values in enumerate(search.points(), start=1)]
    keys = {row["key"] for row in rows if row["fits"]}
    plans = [driver.plans[key] for key in keys]
    total = driver.total(plans)
    peak = max((row["needed_bytes"] for row in rows if row["fits"]), default=0)
    summary: dict[str, Any] = {
        "points": len(rows),
        "jobs": len(keys),
        "fit": sum(bool(r["fits"]) for r in rows),
        "seconds": total,
    }
    summary |= {
        "needed_bytes": peak,
        "at_once": launcher.width,
        "times_from": driver.pace.source(plans),
        "more": search.more,
    }
    if format == "json":
        print(json.dumps({**summary, "rows": rows}, ensure_ascii=False))
    else:
        from ftrun.report.study_plan import render

        render(summary, rows, driver.pace.words)
    return 0 if keys or search.more else DoesNotFit.exit_code


def _search(study: Study) -> Search:
    made: Search = study.search.load().Search(study.search.typed(), study.axes, study.fixed)
    return made


def _check(study: Study, search: Search) -> None:
    """UserError where no point is a job: the mistake is then in what all of them share."""
    points = Points(study)
    values = search.points() or [{}]
    troubles = []
    for one in values:
        point = points.make(one)
        if point.trouble is None:
            return
        troubles.append(point.trouble)
    if not study.axes or (search.points() and (len(values) >= _SURE or not search.more)):
        raise UserError(troubles[0] + (f" [so are all {len(values)} points]" if len(values) > 1 else ""))


@contextlib.contextmanager
def _at_work(study: Study, search: Search, say: Say) -> Iterator[Driver]:
    """The study's folder held, its record open, its launcher up; all of it closed again."""
    try:
        study.folder.mkdir(parents=True, exist_ok=True)
        held = Lock(study.folder)
    except OSError as error:
        raise UserError(f"out={study.folder}: the folder cannot be used: {error.strerror}; name another") from error
    with contextlib.ExitStack() as stack:
        stack.callback(held.release)
        tidy(study.folder)
        record(study)
        ledger = Ledger(study.folder / "ledger.jsonl", say)
        stack.callback(ledger.close)
        launcher: Launcher = study.launcher.load().Launcher(study.launcher.typed(), study.folder)
        stack.callback(launcher.close)
        if launcher.at_once and (search.depends or search.more):
            raise UserError(
                f"launcher.submit=false: search={study.search.choice} asks for points by what others came to"
            )
        yield Driver(study, search, launcher, ledger, say)


def _outlook(driver: Driver) -> Iterator[str]:
    """What is about to happen, and how long it takes."""
    points = [driver.points.make(values) for values in driver.search.points()]
    invalid = [p for p in points if p.job is None]
    jobs = {p.key: p for p in points if p.job is not None}
    done = [key for key in jobs if driver.is_done(key)]
    left = {key: driver.plans[key] for key in jobs if key in driver.plans and key not in done}
    unfit = {key for key, plan in left.items() if not plan.get("fits")}
    words = [f"{len(points)} point{'s' if len(points) > 1 else ''}" if points else "points as the search asks for them"]
    words += ["more as the search asks for them"] if points and driver.search.more else []
    words += [f"{len(jobs)} different jobs"] if len(jobs) < len(points) - len(invalid) else []
    words += [f"{len(done)} done before"] if done else []
    words += [f"{len(invalid)} invalid"] if invalid else []
    words += [f"{len(unfit)} that do not fit"] if unfit else []
    yield f"study   {driver.study.folder}: {', '.join(words)}"
    for point in invalid[:_LISTED]:
        told = f"{_typed(point)}: "  # a message that begins so says it once
        yield f"        {told}{str(point.trouble).removeprefix(told)}"
    for key in list(unfit)[:_LISTED]:
        plan = left[key]
        yield f"        {_typed(jobs[key])}: {plan.get('why') or (plan.get('trouble') or ('', ''))[1]}"
    fits = [plan for key, plan in left.items() if key not in unfit]
    if fits:
        peak, width = max(f["needed_bytes"] for f in fits), driver.launcher.width
        seconds = driver.total(fits)
        often = "one at a time" if width == 1 else f"up to {width} side by side as their peaks fit together"
        yield (
            f"plan    {len(fits)} to run, {often}; about {driver.pace.words(seconds)} ({driver.pace.source(fits)}); "
            f"{peak / 1e9:.2f} GB at most for one"
        )


def _planned(driver: Driver, number: int, values: Mapping[str, str]) -> dict[str, Any]:
    """A point as `ftrun plan -m` shows it."""
    point = driver.points.make(values)
    made = driver.plans.get(point.key, {})
    trouble = point.trouble or (made.get("trouble") or (None, None))[1]
    names = ("needed_bytes", "peak_bytes", "trainable_params", "micro_batch", "recomputed", "steps", "tokens")
    shown = {"values": values, "key": point.key, "why": trouble or made.get("why")}
    return {
        "number": number,
        **hidden(shown),
        "fits": bool(made.get("fits")) and trouble is None,
        **{name: made.get(name) for name in names},
        "seconds": driver.pace.seconds(made),
    }


def _report(driver: Driver) -> list[dict[str, Any]]:
    """table.csv, report.html and what the search has found, from what is on record."""
    from ftrun.report.study_page import page
    from ftrun.report.study_table import write_csv

    folder = driver.study.folder
    rows = linked(rows_of(driver.ledger.events, folder), folder / "report.html", [folder])
    sentences, (objective, *others) = hidden(driver.search.sentences(rows)), driver.search.objectives
    found.keep(folder, driver.ledger.events, sentences)
    write_csv(folder / "table.csv", rows)
    with aside(folder / "report.html") as beside:
        text = page(driver.study.name, rows, sentences, objective, others=others)
        beside.write_text(text, encoding="utf-8")
    return rows


def _show(driver: Driver, rows: Sequence[Mapping[str, Any]]) -> int:
    """The table on the terminal, and the exit code."""
    from rich.console import Console

    from ftrun.report.study_summary import summary
    from ftrun.report.study_table import render

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    objective = driver.search.objectives[0]
    render(rows, console, objective)
    for line in (*summary(rows, objective), *driver.search.sentences(rows)):
        _say(line)
    _say(f"{driver.study.folder / 'report.html'}, {driver.study.folder / 'table.csv'}")
    wanted = [row for row in rows if row["status"] != "same"]
    probes = [e for e in driver.ledger.of("end") if e.get("kind") == "probe" and e["status"] != "finished"]
    if not wanted and probes:
        raise RunFailed(f"the probe {probes[-1]['status']}: {probes[-1].get('reason')}")
    if any(row["status"] in ("finished", "pruned") for row in wanted) or not wanted:
        return 0
    return DoesNotFit.exit_code if all(r["status"] == "does_not_fit" for r in wanted) else RunFailed.exit_code


def _typed(point: Point) -> str:
    return " ".join(f"{key}={value}" for key, value in point.values.items())


def _say(text: str) -> None:
    """A line for the reader; one who has left does not end the study."""
    try:
        print(hide(text), flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it stays open to the end)
