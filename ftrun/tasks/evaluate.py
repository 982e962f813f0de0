"""Measure a finished run, before and after: held-out loss, exact match, agreement, retention, quantisation drop.

Everything that applies is measured unless eval.KEY turns it off; eval=lm_eval tasks=NAMES asks lm-evaluation-harness.
scale=0.5 takes half of the update, scale=[0,0.5,1] shows what the task costs elsewhere. RUN/eval.json holds it all:
the figures, the trade of several scales and the harness's side by side, each with its `settings`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftrun.errors import UserError
from ftrun.job import Job
from ftrun.runs import cache_dir, check_finished, check_place, finite, read_json, write_json
from ftrun.schema import option

if TYPE_CHECKING:
    from ftrun.tasks.measuring import Measuring
    from ftrun.tasks.tuned import Tuned

Say = Callable[[str], None]

FILE = "eval.json"
# what each kind of evaluation leaves in the file, by the key that tells it from the others
_KINDS = {
    "held_out": ("held_out", "agreement", "retention", "retention_text", "effective_rank", "exact", "drop"),
    "scales": ("scales",),
    "lm_eval": ("lm_eval",),
}


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

    check_finished(Path(run))
    if scale == []:
        raise UserError("scale=[]: expected a number, or a list of some as [0,0.5,1]")
    files, earlier = _places(Path(run), out), read_json(Path(run) / FILE) or {}
    found = report(asked(job, tasks), Path(run), scale, lambda text: print(text, file=sys.stderr))
    whole = joined(found, earlier)
    if format == "json":
        print(json.dumps(finite(whole), ensure_ascii=False), flush=True)
    else:
        render(found, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    keep(whole, files)
    return 0


def _places(run: Path, out: str | None) -> list[Path]:
    """Where the figures go; where the run's own folder takes none, `out` alone. UserError where nothing can go."""
    others = [] if out is None else [Path(out).expanduser()]
    for path in others:
        check_place(path)
    try:
        check_place(run / FILE)
    except UserError:
        if not others:
            raise
        print(f"{run / FILE}: cannot be written; the figures go to {out} alone", file=sys.stderr)
        return others
    return [run / FILE, *others]


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

    The figures lie in the run's eval.json; where that cannot be written, it is said.
    """
    if not _asks(job):
        return None
    found = report(job, out, 1.0, say)
    try:
        keep(joined(found, read_json(out / FILE) or {}), [out / FILE])
    except UserError as error:
        say(f"warning: eval: {error}")
    return found


def undone(job: Job, run: Path) -> bool:
    """Whether a finished run's eval asks for figures at its end that eval.json does not have of what is learnt now."""
    kind = "lm_eval" if job.eval.kind == "lm_eval" else "held_out"
    return _asks(job) and kind not in _of(read_json(run / FILE) or {}, _learnt(run))


def _asks(job: Job) -> bool:
    options = job.eval.options
    wanted = [getattr(options, key, None) not in (None, False, "none") for key in ("agreement", "exact", "drop")]
    return any(wanted) or job.eval.kind == "lm_eval" or getattr(options, "retention_path", None) is not None


def report(job: Job, run: Path, scale: float | Sequence[float], say: Say) -> dict[str, Any]:
    """The figures and their settings.

    Raises UserError where the run is not at its end, or has nothing to be measured by.
    """
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
    recorded = (read_json(tuned.run / "result.json") or {}).get("base")
    return {
        "run": str(tuned.run),
        "job": job.choices,
        "base": {**(recorded if isinstance(recorded, dict) else base.describe()), "quantisation": scheme},
        "seed": job.seed,
        "eval": dataclasses.asdict(job.eval.options),
        "drifts": tuned.drifts,
        "learnt": _learnt(tuned.run),
    }


def _learnt(run: Path) -> Any:
    """What tells a run's weights from those that it had before it went on: the hashes of its files."""
    for name in ("adapter", "model"):
        if (record := read_json(run / name / "provenance.json")) is not None:
            return record.get("files")
    return None


def joined(found: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """What eval.json holds: these figures, and those of other kinds that an earlier one has of the same weights.

    `settings` says of each kind how it was measured; the keys beside the figures are those of this one.
    """
    kind = next(name for name in _KINDS if name in found)
    others = {name: one for name, one in _of(earlier, found["learnt"]).items() if name != kind}
    mine = {key: value for key, value in found.items() if key not in _KINDS[kind]}
    kept = {key: earlier[key] for name in others for key in _KINDS[name] if key in earlier}
    return {**found, **kept, "settings": {**others, kind: mine}}


def _of(earlier: Mapping[str, Any], learnt: Any) -> dict[str, Any]:
    """The kinds that an eval.json has of these weights, with their settings."""
    settings = earlier.get("settings")
    pairs = settings.items() if isinstance(settings, dict) else ()
    return {k: one for k, one in pairs if k in _KINDS and isinstance(one, dict) and one.get("learnt") == learnt}


def keep(found: dict[str, Any], files: Sequence[Path]) -> None:
    """The figures into files, each whole or not at all. Raises UserError where some cannot be written."""
    gc.collect()
    wrong = []
    for path in files:
        try:
            write_json(path, found)
        except OSError as error:
            wrong.append(f"{path}: cannot be written: {error.strerror or error}")
    if wrong:
        raise UserError("; ".join(wrong))
