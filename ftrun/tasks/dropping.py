"""What quantisation costs: the same rows through the base and the tuned model, each quantised and not."""

from __future__ import annotations

import gc
from typing import Any

from ftrun.evals import kinds
from ftrun.evals.divergence import Scored
from ftrun.tasks.measuring import Look, Measuring, by_kind
from ftrun.tasks.tuned import open_tuned

# the four models, the first the one that the others are compared with
BASE, QUANTISED, TUNED, OVER_BASE = "base", "quantised_base", "tuned_quantised", "tuned_on_base"


def drop(measuring: Measuring, factor: float) -> dict[str, Any]:
    """{tokens: by kind, MODEL: {loss, numbers, structure, words, agreement, exact}, drop: {base, tuned}}, nats a token.

    The quantised models are measured first and let go: one model at a time is in memory, and what `measuring` was
    given is of no use afterwards. drop: how much higher the quantised loss is.
    """
    found: dict[str, Scored] = {}
    matched: dict[str, float | None] = {}

    def look(name: str, at: Look) -> None:
        shown = name.replace("_", " ")
        say(f"drop: the held-out rows through the {shown}")
        found[name] = at.scored()
        result = measuring.exactly(at)
        matched[name] = None if result is None else result["share"]

    tuned, options = measuring.tuned, measuring.options
    run, job, cache, say, tokenizer = tuned.run, tuned.job, tuned.cache, tuned.say, tuned.tokenizer
    scheme, stored = tuned.parts.quantiser.scheme(), tuned.parts.base.describe(hashed=False)["stored_as"]
    look(QUANTISED, measuring.before)
    look(TUNED, measuring.at(factor))
    tuned.let_go()
    gc.collect()
    plain = open_tuned(run, job, cache, say, plain=True)
    look(BASE, Look(plain, options, 0.0))
    look(OVER_BASE, Look(plain, options, factor))
    masks = kinds.masks(found[BASE].tokens, tokenizer)
    made: dict[str, Any] = {"scheme": scheme, "dtype": job.model.options.dtype, "base_stored_as": stored}
    made["tokens"] = {name: int(mask.sum()) for name, mask in masks.items()}
    for name in (BASE, QUANTISED, TUNED, OVER_BASE):
        made[name] = {**by_kind(found[name], masks, found[BASE].likeliest), "exact": matched[name]}
    pairs = {"base": (QUANTISED, BASE), "tuned": (TUNED, OVER_BASE)}
    made["drop"] = {what: made[one]["loss"] - made[other]["loss"] for what, (one, other) in pairs.items()}
    return made
