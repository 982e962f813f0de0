"""Measure a finished run, before and after: held-out loss, exact match, agreement, retention, quantisation drop.

Everything that applies is measured unless eval.KEY turns it off; eval=lm_eval tasks=NAMES asks lm-evaluation-harness.
scale=0.5 takes half of the update, scale=[0,0.5,1] shows what the task costs elsewhere. RUN/eval.json holds it all.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftrun.errors import UserError
from ftrun.job import Job
from ftrun.runs import cache_dir, read_json, write_json
from ftrun.schema import option

if TYPE_CHECKING:
    from ftrun.tasks.measuring import Measuring
    from ftrun.tasks.tuned import Tuned

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What this verb takes besides the job's keys."""

    run: str | None = option(None, "folder of a finished run", form="a folder, as run=runs/one")
    scale: float | list[float] = option(1.0, "how much of the update; a list: the trade at each of them", ge=0)
    tasks: str | list[str] | None = option(None, "tasks of eval=lm_eval, as arc_easy,hellaswag")
    out: str | None = option(None, "another file for what RUN/eval.json holds", form="a file, as out=figures.json")
    format: str = option("text", "text, or json: one object on standard output", choices=("text", "json"))


def run(
    job: Job,
    run: str,
    scale: float | list[float] = 1.0,
    tasks: str | list[str] | None = None,
    out: str | None = None,
    format: str = "text",
) -> int:
    """Measure, keep the figures in the run's folder, and print them."""
    from rich.console import Console

    from ftrun.report.eval_text import render

    if scale == []:
        raise UserError("scale=[]: expected a number, or a list of some as [0,0.5,1]")
    found = report(asked(job, tasks), Path(run), scale, lambda text: print(text, file=sys.stderr))
    keep(found, [Path(run) / "eval.json", *([Path(out)] if out else [])])
    if format == "json":
        print(json.dumps(found, ensure_ascii=False))
    else:
        render(found, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    return 0


def asked(job: Job, tasks: str | list[str] | None) -> Job:
    """The job with all on that its eval leaves to this verb, and with the verb's tasks. Raises UserError."""
    from ftrun.compose import changed
    from ftrun.evals.lm_eval import names
    from ftrun.tasks.tuned import replaced

    if job.eval.kind == "lm_eval":
        return job if tasks is None else replaced(job, "eval", tasks=names(tasks))
    if tasks is not None:
        raise UserError(f"tasks={tasks}: has no effect with eval={job.eval.choice}; use eval=lm_eval")
    if job.eval.kind == "none":
        job = changed(job, ["eval=all"])
    options, every = job.eval.options, {"agreement": True, "exact": "auto", "drop": True}
    return replaced(job, "eval", **{k: v for k, v in every.items() if getattr(options, k, v) is None})


def at_end(job: Job, out: Path, say: Say) -> dict[str, Any] | None:
    """What a job's eval asks for beyond the loop's own evaluations, of its run that has just ended; None for nothing.

    The figures lie in the run's eval.json.
    """
    options = job.eval.options
    wanted = [getattr(options, key, None) not in (None, False, "none") for key in ("agreement", "exact", "drop")]
    if not any(wanted) and job.eval.kind != "lm_eval" and getattr(options, "retention_path", None) is None:
        return None
    found = report(job, out, 1.0, say)
    keep(found, [out / "eval.json"])
    return found


def report(job: Job, run: Path, scale: float | Sequence[float], say: Say) -> dict[str, Any]:
    """What eval.json holds. Raises UserError where the run is not at its end, or has nothing to be measured by."""
    from ftrun.tasks.measuring import Measuring
    from ftrun.tasks.tuned import open_tuned

    cache, options = cache_dir(), job.eval.typed()
    tuned = open_tuned(run, job, cache, say)
    found = {**_facts(tuned, job), "scale": scale}
    factors = [scale] if isinstance(scale, int | float) else list(scale)
    for factor in factors:
        with tuned.scaled(factor):
            pass  # a method that has no in-between says so at once
    if job.eval.kind == "lm_eval":
        from ftrun.tasks.harness import harness

        return {**found, "lm_eval": harness(tuned, job, factors)}
    if not len(tuned.corpus.held_out):
        raise UserError(f"run={run}: its data holds no row out to be measured by; data.held_out_path=FILE names others")
    base = None if tuned.tuner.switchable else open_tuned(run, job, cache, say, tuned=False)
    if base is not None:
        found["drifts"] = _drifts(base, "model")
    measuring = Measuring(tuned, base, options)
    found["rows"] = sum(len(batch.rows) for batch in measuring.before.batches)
    if not isinstance(scale, int | float):
        return {**found, "scales": measuring.trade(factors)}
    found |= measuring.figures(factors[0])
    found["drop"] = None
    if options.drop:
        found["drop"] = _drop(measuring, job, factors[0])
    return found


def _drop(measuring: Measuring, job: Job, factor: float) -> dict[str, Any] | None:
    from ftrun.tasks.dropping import drop

    tuned = measuring.tuned
    if job.quant.kind == "none":
        tuned.say(f"drop: not measured: quant={job.quant.choice}: the run's base is not quantised")
        return None
    return drop(measuring, factor)


def _facts(tuned: Tuned, job: Job) -> dict[str, Any]:
    """Which run this is, on which base, and in what that base differs from the one it was trained on."""
    base, scheme = tuned.parts.base, tuned.parts.quantiser.scheme()
    result = read_json(tuned.run / "result.json") or {}
    return {
        "run": str(tuned.run),
        "job": job.choices,
        "base": {**(result.get("base") or base.describe()), "quantisation": scheme},
        "seed": job.seed,
        "eval": dataclasses.asdict(job.eval.options),
        "drifts": _drifts(tuned, "adapter"),
    }


def _drifts(opened: Tuned, name: str) -> list[str]:
    """In what the base of an opened run differs from the one on record beside what was trained on it."""
    from ftrun.models import provenance

    recorded = read_json(opened.run / name / provenance.FILE)
    if recorded is None:
        return []
    now = provenance.record(opened.parts.base, opened.parts.quantiser.scheme())
    return [str(one) for one in provenance.drifts(recorded, now)]


def keep(found: dict[str, Any], files: Sequence[Path]) -> None:
    """The figures into files, whole or not at all. Raises UserError where one cannot be written."""
    gc.collect()
    for path in files:
        try:
            write_json(path.expanduser(), found)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
