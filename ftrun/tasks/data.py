"""Show the first rows as the model will see them, and what was dropped and why."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from ftrun.job import Job
from ftrun.runs import cache_dir
from ftrun.schema import option


@dataclass(frozen=True)
class Options:
    """What this verb takes besides the job's keys."""

    rows: int = option(3, "rows to show", ge=0)
    format: str = option("text", "text, or json: one object on standard output", choices=("text", "json"))


def run(job: Job, rows: int, format: str) -> int:
    """Show the job's data; no weight is read."""
    from rich.console import Console

    from ftrun import assemble
    from ftrun.data.show import data_report, render

    cache = cache_dir()
    parts = assemble.sketch(job, cache, lambda text: print(text, file=sys.stderr))
    corpus = assemble.rows(job, parts, cache, lambda text: print(text, file=sys.stderr))
    report = data_report(corpus, parts.base.tokenizer(), rows)
    if format == "json":
        print(json.dumps(report, ensure_ascii=False))
    else:
        render(report, Console())
    return 0
