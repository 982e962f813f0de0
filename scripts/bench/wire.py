"""One of several processes at a job: how much of its steps a message is under way.

    python -m scripts.bench.wire JSON     {overrides: [...], processes: N, out: FILE}

Starts itself anew as so many ranks, by ftrun's own launcher. Each takes a few steps of the job, timed, then some under
torch's profiler, which sees each collective from its call to its end. Prints one JSON, the first rank's: seconds a
step, and those in which a collective of gloo's was open, waiting for the slower rank among them.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ftrun import assemble, stepping
from ftrun.compose import compose
from ftrun.runs import cache_dir
from ftrun.train.launch import launch
from ftrun.train.loop import Work, accumulate, clip, update
from ftrun.train.ranks import end, join

WARM, TIMED, PROFILED = 2, 3, 3  # steps


def main() -> None:
    """Run as a program, and as each of the ranks that it starts."""
    told = json.loads(sys.argv[1])
    out = Path(told["out"])
    if "RANK" not in os.environ:
        launch(["-m", "scripts.bench.wire", sys.argv[1]], told["processes"])
        print(out.read_text(encoding="utf-8"))
        return
    found = measured(told["overrides"])
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(found), encoding="utf-8")
    end(0)


def measured(overrides: Sequence[str]) -> dict[str, Any]:
    """The figures of this rank."""
    job, cpu = compose(list(overrides)), torch.device("cpu")
    micro_batch = job.batch // job.devices  # all of a rank's rows at once
    ranks = join("cpu")
    torch.manual_seed(job.seed)
    parts = assemble.sketch(job, cache_dir(), _nothing, whole=True)
    corpus = assemble.rows(job, parts, cache_dir(), _nothing)
    assemble.furnish(job, parts, cpu, cache_dir(), _nothing, recomputed=0)
    parallel = assemble.shared(job, parts, ranks, job.strategy, "cpu")
    work = assemble.work(job, parts, cpu, WARM + TIMED + PROFILED, parallel=parallel, ranks=ranks)
    work.model.train()

    def step(number: int) -> float:
        started = time.perf_counter()
        batches = stepping.step_batches(job, corpus, micro_batch, 0, number, ranks.rank)
        _step(work, batches)
        return time.perf_counter() - started

    timed = [step(number) for number in range(WARM + TIMED)][WARM:]
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        profiled = [step(WARM + TIMED + number) for number in range(PROFILED)]
    spans = [(e.time_range.start, e.time_range.end) for e in seen.events() or [] if e.name.startswith("gloo:")]
    open_seconds = union(spans) / 1e6
    return {
        "seconds": statistics.median(timed),
        "profiled_s": sum(profiled) / PROFILED,
        "messages": len(spans) / PROFILED,
        "wire_s": open_seconds / PROFILED,
        "share": open_seconds / sum(profiled),
    }


def _step(work: Work, batches: Sequence[Any]) -> None:
    """One optimiser step, as the loop takes it."""
    supervised = work.ranks.sums([float(sum(b.supervised for b in batches))])[0]
    accumulate(work, batches, supervised)
    clip(work)
    update(work)


def union(spans: Sequence[tuple[float, float]]) -> float:
    """The length of what the spans cover together."""
    covered, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return covered


def _nothing(text: str) -> None:
    """What is prepared is of no interest here."""


if __name__ == "__main__":
    main()
