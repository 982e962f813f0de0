"""A study at work: ask the search, plan what it asks for, run what fits, tell it what came of it; all of it on record.

The ledger is written before anything counts, so that a study which was killed goes on: a job that is done is not done
twice, and a search that learns from what it hears is told everything again in the order in which it happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ftrun.errors import UserError
from ftrun.secrets import hidden
from ftrun.studies.launching import Event, Launcher, Task
from ftrun.studies.ledger import Ledger
from ftrun.studies.pace import Pace
from ftrun.studies.points import Point, Points
from ftrun.studies.rows import figures_of
from ftrun.studies.searching import Outcome, Search, Trial
from ftrun.studies.study import Study
from ftrun.train.interrupt import stop_requests

Say = Callable[[str], None]
_WAIT = 1.0  # seconds between two looks at what else there is to do
_GRACE = 120.0  # seconds that jobs have to save what they have
# what is not tried again when a study goes on; what failed for another reason than the job's own is
_FINAL = ("finished", "paused", "pruned", "diverged")


@dataclass
class Running:
    """A trial whose job is planned, waiting or at work, and trials of the same job that wait for it."""

    trial: Trial
    point: Point
    since: float | None = None
    began: float | None = None  # by its worker's own clock, where the worker tells
    fresh: bool = True  # whether nothing of it was done before
    followers: list[Trial] = field(default_factory=list)


class Driver:
    """One study, from where its folder stands to its end."""

    def __init__(self, study: Study, search: Search, launcher: Launcher, ledger: Ledger, say: Say) -> None:
        self.study, self.search, self.launcher, self.ledger, self.say = study, search, launcher, ledger, say
        self.points = Points(study)
        self.plans: dict[str, Mapping[str, Any]] = {}
        self.pace = Pace()
        self._running: dict[str, Running] = {}  # by task
        self._done = {_place(e): e for e in ledger.of("end") if e["status"] in _FINAL and e.get("kind") != "probe"}
        self._failed: dict[str, Mapping[str, Any]] = {}  # in this life of the study; in the next they are tried again
        self._seen = {_name(e["values"], e.get("until"), e.get("kind")) for e in ledger.of("trial")}
        self._numbers = {e["number"] for e in ledger.of("trial")}
        self._next = 1 + max((e["row"] for e in ledger.of("trial")), default=0)
        self._again: list[Trial] = self._replayed() if search.depends else []

    # --- before ---

    def plan(self, whole: bool = True) -> None:
        """Plan every point that is certain to be tried and not done, before the first one starts.

        whole: with the base's files and the data, as training has them; else with what is at hand.
        """
        begun = {key for key, _ in self._done}
        wanted: dict[str, Point] = {}
        for values in self.search.points():
            point = self.points.make(values)
            if point.job is not None and point.key not in begun:  # one that is left at a rung may be done with
                wanted.setdefault(point.key, point)
        for point in wanted.values():
            task = self._task(f"plan-{point.key}", "plan", point)
            self.launcher.submit(replace(task, request={**task.request, "whole": whole}))
        missing = {f"plan-{key}" for key in wanted}
        while missing:
            for event in self.launcher.wait(_WAIT):
                if event.kind == "planned" or (event.kind == "ended" and event.id in missing):
                    self._planned(event)
                    missing.discard(event.id)

    def is_done(self, key: str) -> bool:
        """Whether a job came to its end before."""
        return (key, None) in self._done

    # --- at work ---

    def run(self) -> None:
        """Until the search has nothing left to ask for. KeyboardInterrupt leaves jobs with checkpoints, and so does an
        OSError: a record that cannot be written.
        """
        with stop_requests(lambda text: None) as asked:  # in the midst of an event it would be lost
            try:
                while not asked() and (self._fill() or self._running):
                    for event in self.launcher.wait(_WAIT):
                        self._hear(event)
            except OSError:  # of what happens now nothing would count
                self._leave()
                raise
            if asked():
                self._leave()
                raise KeyboardInterrupt

    def _fill(self) -> bool:
        """Ask for as much as can run at once, and a little ahead; whether anything was asked for."""
        asked = False
        width = self.launcher.width
        ahead = min(width, self.search.at_once) if self.search.depends else 2 * width + 2
        ahead = len(self.search.points()) + 1 if self.launcher.at_once else ahead
        while len(self._running) < ahead:
            trial = self._again.pop(0) if self._again else self.search.ask()
            if trial is None:
                break
            self._take(trial)
            asked = True
        return asked

    def _take(self, trial: Trial) -> None:
        point = self.points.make(trial.values)
        self._log(trial, point)
        done = self._done.get((point.key, trial.until)) or self._done.get((point.key, None))
        known = done or self._failed.get(point.key)
        at_work = (r for r in self._running.values() if r.trial.kind == "train")
        same = next((r for r in at_work if r.point.key == point.key), None)
        if point.job is None:
            self._end(trial, point, "invalid", point.trouble)
        elif known is not None and trial.kind == "train":
            outcome = Outcome(known["status"], known.get("reason"), known.get("figures") or {})
            self._tell(trial, point, outcome, known)
        elif same is not None and trial.kind == "train":
            same.followers.append(trial)
        else:
            name = str(trial.number)
            self._running[name] = Running(trial, point)
            plan = self.plans.get(point.key)
            if plan is None:
                self.launcher.submit(self._task(f"plan-{point.key}-{name}", "plan", point))
            else:
                self._go(name, plan)

    def _hear(self, event: Event) -> None:
        if event.id.startswith("plan-"):
            self._planned(event)
            name = event.id.split("-")[-1]
            if name in self._running:
                self._go(name, self.plans[self._running[name].point.key])
            return
        one = self._running[event.id]
        if event.kind == "began":
            one.since, one.fresh = time.monotonic(), not event.values.get("steps")
            one.began = event.values.get("at")
            self.ledger.add("begin", number=one.trial.number, key=one.point.key)
        elif event.kind == "rung":
            step, loss = int(event.values["step"]), float(event.values["loss"])
            go = self.search.verdict(one.trial, step, loss)
            self.ledger.add("rung", number=one.trial.number, key=one.point.key, step=step, loss=loss, go=go)
            self.launcher.verdict(event.id, go)
        elif event.kind == "ended":
            self._ended(event, one)

    def _planned(self, event: Event) -> None:
        key = event.id.split("-")[1]
        found = dict(event.values)
        if event.kind == "ended" or found.get("status") != "finished":
            found |= {"trouble": (found.get("status") or "failed", found.get("reason"))}
        self.plans[key] = found
        self.pace.meet(found)

    def _go(self, name: str, plan: Mapping[str, Any]) -> None:
        """Start a planned job, or end it here where it cannot be one or does not fit."""
        one = self._running[name]
        assert one.point.job is not None
        if "trouble" in plan:
            self.plans.pop(one.point.key, None)  # a worker that was lost over it says nothing of the next try
            self._finish(name, *plan["trouble"])
        elif not plan["fits"] and one.point.job.refuse:
            self._finish(name, "does_not_fit", plan["why"])
        else:
            self.launcher.submit(self._task(name, one.trial.kind, one.point, one.trial, plan))

    def _task(
        self, name: str, do: str, point: Point, trial: Trial | None = None, plan: Mapping[str, Any] | None = None
    ) -> Task:
        request = point.request(self.study.folder / "runs" / self._folder(point))
        if trial is not None:
            request |= {"until": trial.until, "rungs": sorted(self.search.rungs), "asks": trial.asks, **trial.request}
        size = plan.get("ranks", 1) * int(plan["needed_bytes"] + plan.get("process_bytes", 0)) if plan else 0
        usable = ((plan or {}).get("device") or {}).get("usable_bytes") or 0
        share = min(1.0, size / usable) if usable else 1.0
        return Task(name, do, point.key, request, str((plan or {}).get("base", "")), size, share)

    def _folder(self, point: Point) -> str:
        """The run's folder: the one that this job has had from its first trial on."""
        first = next((e for e in self.ledger.of("trial") if e["key"] == point.key and e.get("folder")), None)
        return str(first["folder"]) if first else point.folder

    # --- how it ended ---

    def _ended(self, event: Event, one: Running) -> None:
        status, reason = str(event.values["status"]), event.values.get("reason")
        if warning := event.values.get("warning"):
            self.say(f"warning: {_words(one.point)}: {warning}")
        seconds = None if one.since is None else time.monotonic() - one.since
        if one.began is not None and event.values.get("at"):
            seconds = event.values["at"] - one.began  # of one that was found at work we heard the beginning late
        if status in ("finished", "paused") and seconds is not None and one.trial.kind == "train" and one.fresh:
            self.pace.note(_part(self.plans.get(one.point.key, {}), one.trial.until), seconds)
        self._finish(event.id, status, reason, seconds, event.values.get("probe"))

    def _finish(
        self, name: str, status: str, reason: str | None, seconds: float | None = None, probe: Any = None
    ) -> None:
        one = self._running.pop(name)
        self._end(one.trial, one.point, status, reason, seconds, probe)
        for trial in one.followers:
            self._take(trial)

    def _end(
        self,
        trial: Trial,
        point: Point,
        status: str,
        reason: str | None,
        seconds: float | None = None,
        probe: Any = None,
    ) -> None:
        run = self.study.folder / "runs" / self._folder(point)
        ran = status not in ("invalid", "does_not_fit") and trial.kind == "train"
        figures = figures_of(run, trial.until) if ran else {}
        plan = self.plans.get(point.key, {})
        figures = {**{k: plan[k] for k in ("trainable_params", "total_params") if k in plan}, **figures}
        if ran and "peak_bytes" not in figures:  # the largest step may lie before the rung that it goes on from
            earlier = self.ledger.last("end", key=point.key) or {}
            figures |= {k: v for k, v in (earlier.get("figures") or {}).items() if k == "peak_bytes"}
        if "peak_bytes" in plan:
            figures.setdefault("planned_peak_bytes", plan["peak_bytes"])
            if status in _FINAL:  # one that was too short to be measured took what was planned
                figures.setdefault("peak_bytes", plan["peak_bytes"])
        found = self.ledger.add(
            "end",
            number=trial.number,
            key=point.key,
            until=trial.until,
            kind=trial.kind,
            status=status,
            reason=reason,
            seconds=seconds,
            figures=figures,
            probe=probe,
        )
        if trial.kind == "train" and point.job is not None:
            if status in _FINAL:
                self._done[_place(found)] = found
            else:
                self._failed[point.key] = found
        self._tell(trial, point, Outcome(status, reason, figures, probe), None)

    def _tell(self, trial: Trial, point: Point, outcome: Outcome, known: Mapping[str, Any] | None) -> None:
        if known is not None and self.search.depends and not self._has_ended(trial.number):
            fields = {k: known.get(k) for k in ("status", "reason", "figures")}
            self.ledger.add("end", number=trial.number, key=point.key, until=trial.until, **fields)
        self.search.tell(trial, outcome)
        self.told(trial, point, outcome, known is not None)

    def told(self, trial: Trial, point: Point, outcome: Outcome, known: bool) -> None:
        """A line for the reader."""
        if known:
            return
        words = f"{_words(point)}{f' ({trial.note})' if trial.note else ''}: {outcome.status}"
        figures = outcome.figures
        if outcome.status in ("finished", "paused", "pruned"):
            loss, speed = figures.get("loss", figures.get("rung_loss")), figures.get("tokens_per_s")
            words += f" after step {trial.until}" if outcome.status == "paused" else ""
            words += f", held-out loss {loss:.4f}" if loss is not None else ""
            words += f", {figures['peak_bytes'] / 1e9:.3g} GB" if "peak_bytes" in figures else ""
            words += f", {speed:,.0f} tokens/s" if speed else ""
        elif outcome.reason:
            reason = outcome.reason.splitlines()[0].removeprefix(f"{_words(point)}: ")  # which the line begins with
            words += f": {reason[:300]}"
        self.say(f"{words}{self._left()}")

    def _left(self) -> str:
        """How long the rest takes, as far as its points are known."""
        keys, left = {self.points.make(v).key for v in self.search.points()}, self.search.left
        keys -= {key for key, _ in self._done} if left is None else set()
        seconds = self.pace.total([self.plans[k] for k in keys if k in self.plans], self.launcher.width)
        seconds = None if seconds is None else seconds * (self.search.share if left is None else left)
        return f"   ({self.pace.words(seconds)} left)" if keys and seconds else ""

    def total(self, plans: Sequence[Mapping[str, Any]]) -> float | None:
        """Seconds that the search takes over these jobs; None where that cannot be told."""
        seconds = self.pace.total(plans, self.launcher.width)
        return None if seconds is None else seconds * self.search.share

    def _leave(self) -> None:
        """Let jobs save what they have; a second Ctrl-C ends them as they are."""
        self.say("stopping: each job at work saves a checkpoint (once more to stop at once)")
        self.launcher.stop()
        until = time.monotonic() + _GRACE
        at_work = {name for name, one in self._running.items() if one.since is not None}
        while at_work and time.monotonic() < until:
            for event in self.launcher.wait(_WAIT):
                if event.kind == "ended":
                    at_work.discard(event.id)
        if at_work:
            words = ", ".join(_words(self._running[name].point) for name in sorted(at_work))
            self.say(f"cut off, not having come to the end of a step in time: {words}")

    # --- the record ---

    def _log(self, trial: Trial, point: Point) -> None:
        """The trial on record, once."""
        name = _name(hidden(trial.values), trial.until, trial.kind)
        if trial.number in self._numbers if self.search.depends else name in self._seen:
            return
        self._seen.add(name)
        self._numbers.add(trial.number)
        self.ledger.add(
            "trial",
            number=trial.number,
            row=self._next,
            key=point.key,
            values=dict(trial.values),
            until=trial.until,
            kind=trial.kind,
            note=trial.note,
            folder=self._folder(point) if point.job is not None else None,
        )
        self._next += 1

    def _has_ended(self, number: int) -> bool:
        return self.ledger.last("end", number=number) is not None

    def _replayed(self) -> list[Trial]:
        """Tell the search everything again; returns the trials that were asked for and have not ended."""
        open_trials: dict[int, Trial] = {}
        stopped: set[Any] = set()
        for event in list(self.ledger.events):
            number = event.get("number")
            if event["event"] == "trial":
                trial = self.search.ask()
                if trial is None:
                    continue  # fewer are asked for now: what was done stays on record
                if hidden(trial.values) != event["values"]:
                    raise UserError(
                        f"{self.ledger.path}: trial {number} was {event['values']}, and this search now draws "
                        f"{dict(trial.values)}: another version of its library, or a damaged line. Name another study"
                    )
                open_trials[trial.number] = trial
            elif event["event"] == "rung" and number in open_trials:
                self.search.verdict(open_trials[number], event["step"], event["loss"])
                stopped |= {number} if not event["go"] else set()
            elif event["event"] == "end" and number in open_trials:
                if self.search.retries and event["status"] not in _FINAL:
                    continue
                outcome = Outcome(event["status"], event.get("reason"), event.get("figures") or {}, event.get("probe"))
                self.search.tell(open_trials.pop(number), outcome)
        for number in stopped & open_trials.keys():  # stopped by a verdict, killed before that was on record
            trial = open_trials.pop(number)
            self._end(trial, self.points.make(trial.values), "pruned", None)
        return list(open_trials.values())


def _place(event: Mapping[str, Any]) -> tuple[str, int | None]:
    return str(event["key"]), event.get("until") if event["status"] == "paused" else None


def _part(plan: Mapping[str, Any], until: int | None) -> Mapping[str, Any]:
    """The plan of a job's first `until` steps, as far as its work goes."""
    if until is None or not plan.get("work") or not plan.get("steps"):
        return plan
    return {**plan, "work": plan["work"] * min(1.0, until / plan["steps"])}


def _name(values: Mapping[str, str], until: int | None, kind: str | None) -> tuple[Any, ...]:
    return (*sorted(values.items()), until, kind or "train")


def _words(point: Point) -> str:
    return " ".join(f"{key}={value}" for key, value in point.values.items()) or "the job"
