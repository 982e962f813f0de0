"""Where the time of our own step goes: a few steps of the job in this process, timed, then under torch's profiler.

    python -m scripts.bench.breakdown JSON    {overrides: [...]}

Prints one JSON: seconds a step by kind (patterns.py), the rest's largest, and the floor (floor.py).
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ftrun import assemble, stepping
from ftrun.compose import compose
from ftrun.metrics.console import Console
from ftrun.models.forward import TokenLoss
from ftrun.models.select import anatomy
from ftrun.runs import cache_dir
from ftrun.tasks.session import Session
from ftrun.train import recompute
from ftrun.train.loop import Work, accumulate, clip, update
from scripts.bench import floor, patterns

WARM, TIMED, PROFILED = 1, 2, 2  # steps
_SHOWN = 12  # of the rest's operations


def main() -> None:
    """Run as a program."""
    job = compose(json.loads(sys.argv[1])["overrides"])
    session = Session(job, cache_dir(), Console())
    session.prepare(Path("none"))
    shape, counted = of_job(session)
    rate = floor.measured_rate(shape, int(counted["tokens"]), int(counted["supervised"]))
    found = {**measured(session), **counted, "products_per_s": rate}
    found["floor_s"] = sum(counted["operations"].values()) / rate
    print(json.dumps(found))


def of_job(session: Session) -> tuple[floor.Shape, dict[str, Any]]:
    """(the job as the floor sees it, means over its steps: tokens, supervised tokens, operations by part)."""
    job, parts, corpus = session.job, session.parts, session.corpus
    trained = {site.name for site in parts.anatomy.sites}
    rank = int(getattr(parts.tuner.options, "rank", 0))
    config = parts.model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    weights = tuple(
        floor.Weight(s.layer, s.role, s.in_features, s.out_features, rank if s.name in trained else 0)
        for s in anatomy(parts.model, "all", "all").sites
        if s.layer is not None
    )
    depth, recomputed, dora = parts.anatomy.depth, session.settled.recomputed, parts.tuner.kind == "dora"
    shape = floor.Shape(weights, depth, heads * width, config.hidden_size, config.vocab_size, recomputed, dora)
    steps = [stepping.micro_rows(job, corpus, job.batch, step)[0] for step in range(session.total)]
    lengths = [corpus.train.lengths[rows].tolist() for rows in steps]
    learnt = [int(corpus.train.supervised[rows].sum()) for rows in steps]
    each = [floor.operations(shape, n, s) for n, s in zip(lengths, learnt, strict=True)]
    mean = {part: statistics.mean(one[part] for one in each) for part in each[0]}
    tokens = statistics.mean(sum(n) for n in lengths)
    return shape, {"tokens": tokens, "supervised": statistics.mean(learnt), "operations": mean}


def measured(session: Session) -> dict[str, Any]:
    """The steps themselves: seconds of each that was only timed, and by kind of those that were profiled."""
    job, device = session.job, assemble.torch_device(session.device)
    torch.manual_seed(job.seed)
    mark_parts()
    assemble.furnish(job, session.parts, device, session.cache, print, session.settled.recomputed)
    work = assemble.work(job, session.parts, device, session.total)
    work.model.train()
    timed = [_step(session, work, number) for number in range(WARM + TIMED)][WARM:]
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        profiled = [_step(session, work, WARM + TIMED + number) for number in range(PROFILED)]
    kinds, rest = sums(seen.events() or [])
    largest = sorted(rest.items(), key=lambda item: -item[1])[:_SHOWN]
    kinds[patterns.OUTSIDE] = max(0.0, sum(profiled) - sum(kinds.values()))
    return {
        "seconds": timed,
        "profiled_s": sum(profiled) / PROFILED,
        "kinds": {kind: kinds[kind] / PROFILED for kind in patterns.ORDER},
        "rest": {name: seconds / PROFILED for name, seconds in largest},
        "micro_batch": session.settled.micro_batch,
        "recomputed": session.settled.recomputed,
    }


def _step(session: Session, work: Work, number: int) -> float:
    """One optimiser step as the loop takes it; returns its seconds."""
    settled = session.settled
    step = number % session.total
    batches = stepping.step_batches(session.job, session.corpus, settled.micro_batch, session.pad_id, step)
    started = time.perf_counter()
    float(accumulate(work, batches))
    with record_function(patterns.OPTIMISER):
        clip(work)
        update(work)
    return time.perf_counter() - started


def mark_parts() -> None:
    """The loss and each layer that is computed again get a mark in the profile."""
    TokenLoss.score = marked(TokenLoss.score, patterns.LOSS)  # type: ignore[method-assign]
    again = recompute.checkpoint
    recompute.checkpoint = lambda forward, *args, **more: again(marked(forward, patterns.LAYER), *args, **more)


def marked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function within a mark of the profiler's."""

    @functools.wraps(function)
    def inner(*args: Any, **more: Any) -> Any:
        with record_function(name):
            return function(*args, **more)

    return inner


def sums(events: Any) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds by kind, seconds by name of what is in no kind) of the profiler's events, each's own time alone."""
    kinds: dict[str, float] = defaultdict(float)
    rest: dict[str, float] = defaultdict(float)
    for event in events:
        seconds = event.self_cpu_time_total / 1e6
        kind = patterns.classify(_names(event))
        kinds[kind] += seconds
        if kind == patterns.REST:
            rest[event.name] += seconds
    return kinds, rest


def _names(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


if __name__ == "__main__":
    main()
