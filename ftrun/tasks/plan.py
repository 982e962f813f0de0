"""Plan the job's memory: by component, at its peak, through a step. Reads no weights, allocates nothing.

Exit code 3 where the job does not fit its device, with the whole plan all the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.errors import DoesNotFit
from ftrun.job import Job
from ftrun.runs import cache_dir
from ftrun.schema import option


@dataclass(frozen=True)
class Options:
    """What this verb takes besides the job's keys."""

    format: str = option("text", "text, or json: one object on standard output", choices=("text", "json"))
    figure: str | None = option(None, "also draw the plan into this file, as SVG")


def run(job: Job, format: str, figure: str | None) -> int:
    """Print the plan; returns the exit code: 0, or 3 where the job does not fit."""
    from rich.console import Console

    from ftrun.report.figure import plan_figure
    from ftrun.report.plan_text import render

    made = report(job, lambda text: print(text, file=sys.stderr))
    if figure:
        Path(figure).expanduser().write_text(plan_figure(made), encoding="utf-8")
    if format == "json":
        print(json.dumps(made, ensure_ascii=False))
    else:
        render(made, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    return 0 if made["fits"] else DoesNotFit.exit_code


def report(job: Job, say: Callable[[str], None]) -> dict[str, Any]:
    """The plan as JSON-able values, with what explains it: modules, paging, cards, savings."""
    from ftrun import assemble
    from ftrun.memory.device import resolve
    from ftrun.planning.advice import Advisor
    from ftrun.planning.cards import cards, paging
    from ftrun.planning.plan import trained_modules
    from ftrun.planning.settle import settle, supply_at_hand
    from ftrun.planning.twin import Twin

    device = resolve(job.device.typed())
    parts = assemble.sketch(job, cache_dir(), say)
    supply, source = supply_at_hand(job, parts, cache_dir(), say)
    twin = Twin(job, parts, device)
    settled = settle(job, twin, supply(job), device, source)
    made = settled.plan
    batches = supply(job)(settled.micro_batch)[1]
    return {
        **made.as_dict(),
        "job": job.choices,
        "depth": twin.depth,
        "needed_bytes": made.needed_bytes,
        "modules": trained_modules(twin),
        "paging": paging(job, twin),
        "cards": cards(job, parts, twin, batches, settled),
        "savings": [saving.as_dict() for saving in Advisor(job, twin, settled, supply, device).savings()],
    }
