"""eval=lm_eval: a run's models handed to lm-evaluation-harness, as they are, quantised, and with what was learnt."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from ftrun.errors import UserError
from ftrun.evals import lm_eval
from ftrun.job import Job
from ftrun.tasks.measuring import Look
from ftrun.tasks.tuned import Tuned, open_tuned


def harness(tuned: Tuned, job: Job, factors: Sequence[float]) -> dict[str, Any]:
    """{models: {MODEL: {task: {metric: value}}}}, of the base in its own dtype, the base as the run has it where that
    is quantised, and the tuned model at each scale. `tuned` is of no use afterwards.
    """
    options = job.eval.typed()
    if tuned.tuner.prefix:
        raise UserError("eval=lm_eval: method=prompt cannot be asked: the harness knows nothing of tokens in front")
    manager = lm_eval.check_tasks(options)
    found: dict[str, Any] = {}

    def look(name: str, opened: Tuned, factor: float) -> None:
        opened.say(f"lm_eval: {name}: {', '.join(options.tasks)}")
        with Look(opened, options, factor).within(), opened.generating():
            found[name] = lm_eval.ask(opened.model, opened.tokenizer, options, manager, job.seed)

    run, cache, say = tuned.run, tuned.cache, tuned.say
    for factor in factors:
        look("tuned" if factor == 1 else f"tuned at scale {factor:g}", tuned, factor)
    quantised = job.quant.kind != "none"
    if tuned.tuner.switchable:
        look("base, quantised" if quantised else "base", tuned, 0.0)
    tuned.let_go()
    gc.collect()
    if quantised or not tuned.tuner.switchable:
        look("base", open_tuned(run, job, cache, say, plain=quantised, tuned=False), 0.0)
    order = sorted(found, key=lambda name: (name != "base", name != "base, quantised"))
    return {
        "tasks": options.tasks,
        "limit": options.limit,
        "shots": options.shots,
        "models": {n: found[n] for n in order},
    }
