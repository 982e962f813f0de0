"""Train the job: plan, assemble, train, evaluate, hand over."""

from __future__ import annotations

import time
from pathlib import Path

from ftrun.errors import Interrupted, RunFailed
from ftrun.job import Job
from ftrun.metrics.console import Console
from ftrun.runs import cache_dir, check_run, open_run, read_json


def run(job: Job) -> int:
    """Train the job and leave its run folder; returns the exit code."""
    out = Path(job.out) if job.out else Path("runs") / (job.name or default_name(job))
    check_run(out, job.as_dict(), job.resume)
    if finished(out, job):
        return 0
    console = Console()
    console.show(job.as_dict())
    from ftrun.tasks.session import Session

    session = Session(job, cache_dir(), console)
    session.prepare(out)
    folder = open_run(out, job.as_dict(), job.resume)
    try:
        outcome = session.train(folder)
    except (Interrupted, RunFailed) as error:
        status = "interrupted" if isinstance(error, Interrupted) else "failed"
        session.close(folder, {**session.summary(), "status": status})
        raise
    except BaseException:
        session.close(folder, None)
        if not session.began:
            folder.discard()
        raise
    session.close(folder, outcome)
    return 0


def default_name(job: Job) -> str:
    """Method, rank and the time: "qlora-r16-20260131-142501"."""
    rank = getattr(job.method.options, "rank", None)
    parts = [job.method.choice, f"r{rank}" if rank else "", time.strftime("%Y%m%d-%H%M%S")]
    return "-".join(p for p in parts if p)


def finished(out: Path, job: Job) -> bool:
    """Whether the job in `out` is done; says so."""
    result = read_json(out / "result.json") if out.is_dir() else None
    if not result or result.get("status") != "finished":
        return False
    print(f"{out}: finished, {result.get('steps')} steps; loss {result.get('loss_last')}. Nothing to do")
    return True
