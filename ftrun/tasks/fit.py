"""Find the fastest settings of the job that fit its device, and say why each other choice lost. Trains nothing.

Micro-batch, recomputed layers, the loss's chunk and the quantisation are chosen among; ranks=[8,16] and
seq_lens=[512,1024] let those vary too. Speed is predicted from a short measurement on the device at hand.
Exit code 3 where no choice fits.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftrun.errors import DoesNotFit
from ftrun.job import Job
from ftrun.runs import cache_dir
from ftrun.schema import option


@dataclass(frozen=True)
class Options:
    """What this verb takes besides the job's keys."""

    quants: list[str] | None = option(None, "quantisations to choose among; null = none, int8, nf4")
    ranks: list[int] = option([], "ranks to choose among; [] = the job's own", ge=1)
    seq_lens: list[int] = option([], "lengths to choose among; [] = the job's own", ge=2)
    rows: int = option(12, "choices to show", ge=1)
    format: str = option("text", "text, or json: one object on standard output", choices=("text", "json"))


def run(job: Job, quants: list[str] | None, ranks: list[int], seq_lens: list[int], rows: int, format: str) -> int:
    """Print the choices, the best first; returns 0, or 3 where none fits."""
    from rich.console import Console

    from ftrun.report.fit_text import render

    made = report(job, quants, ranks, seq_lens, lambda text: print(text, file=sys.stderr))
    if format == "json":
        print(json.dumps(made))
    else:
        render(made, rows, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    return 0 if made["best"] else DoesNotFit.exit_code


def report(
    job: Job, quants: list[str] | None, ranks: list[int], seq_lens: list[int], say: Callable[[str], None]
) -> dict[str, Any]:
    """Every choice as JSON-able values, and what their speed was judged by."""
    from ftrun import assemble
    from ftrun.compose import changed
    from ftrun.memory.device import resolve
    from ftrun.planning import speed
    from ftrun.planning.fit import Fit
    from ftrun.planning.settle import supply_at_hand

    def sketch(one: Job) -> assemble.Sketch:
        return assemble.sketch(one, cache_dir(), lambda text: None)

    device = resolve(job.device.typed())
    parts = assemble.sketch(job, cache_dir(), say)
    supply, _ = supply_at_hand(job, parts, cache_dir(), say)
    vary = _vary(job, quants, ranks, seq_lens)
    if device.present:
        say("measuring some short steps of a few layers")
        jobs = [changed(job, [f"quant={name}"]) for name in vary["quant"]]
        judged = speed.fitted(speed.measure(jobs, sketch, supply(job), assemble.torch_device(device)))
    else:
        judged = speed.from_sheet(job.device.typed())
    found = Fit(job, supply, sketch, device, judged).choices(vary)
    return {
        "device": {"name": device.name, "usable_bytes": device.usable_bytes, "present": device.present},
        "speed": {"error": judged.error, "from": judged.words},
        "best": list(found[0].overrides) if found and found[0].fits else None,
        "choices": [choice.as_dict() for choice in found],
    }


def _vary(job: Job, quants: list[str] | None, ranks: list[int], seq_lens: list[int]) -> dict[str, list[Any]]:
    usual = ["none"] if job.method.kind == "full" else ["none", "int8", "nf4"]
    vary: dict[str, list[Any]] = {"quant": usual if quants is None else quants}
    if ranks:
        vary["rank"] = ranks
    if seq_lens:
        vary["seq_len"] = seq_lens
    return vary
