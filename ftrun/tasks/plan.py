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
    savings: int = option(3, "changes to name that save most, each planned in its turn; 0 = none", ge=0)


def run(job: Job, format: str, figure: str | None, savings: int) -> int:
    """Print the plan; returns the exit code: 0, or 3 where the job does not fit."""
    from rich.console import Console

    from ftrun.report.figure import plan_figure
    from ftrun.report.plan_text import render, render_advice

    planning = Planning(job, lambda text: print(text, file=sys.stderr))
    made = planning.plan()
    if figure:
        Path(figure).expanduser().write_text(plan_figure(made), encoding="utf-8")
    if format == "json":
        print(json.dumps({**made, **planning.advice(savings)}, ensure_ascii=False))
        return 0 if made["fits"] else DoesNotFit.exit_code
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    render(made, console)  # what other cards and other settings make of the job takes longer than the plan
    render_advice({**made, **planning.advice(savings)}, console)
    return 0 if made["fits"] else DoesNotFit.exit_code


class Planning:
    """The job, settled and planned; what explains the plan; what would change it."""

    def __init__(self, job: Job, say: Callable[[str], None]) -> None:
        from ftrun import assemble
        from ftrun.memory.device import resolve
        from ftrun.planning.keeping import keeping_notes, settle_keeping
        from ftrun.planning.settle import Settled, notes, settle_sharing, supply_at_hand
        from ftrun.planning.twin import Twin

        self.job, self.device = job, resolve(job.device.typed()).shared_by(job.devices)
        self.parts = assemble.sketch(job, cache_dir(), say)
        self.supply, source = supply_at_hand(job, self.parts, cache_dir(), say)
        out = Path(job.out) if job.out else None

        def attempt(strategy: str) -> tuple[Twin, Settled]:
            twin = Twin(job, self.parts, self.device, strategy=strategy)
            return twin, settle_keeping(job, twin, self.supply, self.device, source, out)

        self.twin, self.settled = settle_sharing(job, attempt)
        for note in (*notes(job, self.twin), *keeping_notes(job, self.settled, self.twin.below)):
            say(note)

    def plan(self) -> dict[str, Any]:
        """The plan as JSON-able values, with the modules that train and what of their state can page."""
        from ftrun.planning.cards import paging
        from ftrun.planning.plan import trained_modules

        made = self.settled.plan
        return {
            **made.as_dict(),
            "job": self.job.choices,
            "depth": self.twin.depth,
            "modules": trained_modules(self.twin),
            "paging": paging(self.job, self.twin),
        }

    def advice(self, count: int) -> dict[str, Any]:
        """What common cards make of the job, and the `count` changes that save most."""
        from ftrun.planning.advice import Advisor
        from ftrun.planning.cards import cards

        advisor = Advisor(self.job, self.twin, self.settled, self.supply, self.device)
        return {
            "cards": cards(self.job, self.parts, self.twin, self.settled),
            "savings": [saving.as_dict() for saving in advisor.savings(count)] if count else [],
        }
