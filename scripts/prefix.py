"""What keeping the frozen layers' outputs brings: a step of layers=last:K against one of layers=all.

    python scripts/prefix.py [--data FILE.jsonl] [--last 8] [--steps 2] [--rounds 3] [OVERRIDES]

The same batches for each, in turn, over lengths seen before; steps of later epochs, where all rows are kept. Prints
tokens a second by the clock and by the processor's time (which other work on the machine disturbs less), the ratios to
layers=all, and how far the losses are apart. Without --data: the bundled conversations.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ftrun import assemble, stepping
from ftrun.compose import compose
from ftrun.runs import cache_dir
from ftrun.train.kept import InMemory, KeptLoss, OnDisk, Store
from ftrun.train.loop import Work, accumulate, clip, update
from ftrun.values import Batch


def main() -> None:
    """Measure the kinds in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a jsonl file")
    parser.add_argument("--last", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="different batches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    data = ["data=chatterbot"] if asked.data is None else ["data=jsonl", f"data.path={asked.data}", "data.held_out=0"]
    common = [*data, "method=lora", "rank=16", "batch=16", "micro_batch=16", "epochs=2", *asked.overrides]
    last = f"layers=last:{asked.last}"
    with tempfile.TemporaryDirectory(prefix="ftrun-prefix-") as folder:
        kinds = {"layers=all": _made([*common, "layers=all"], asked.steps, None)}
        stores: dict[str, Store | None] = {"none": None, "memory": InMemory(), "disk": OnDisk(Path(folder), {})}
        for name, store in stores.items():
            kinds[f"{last} keep_prefix={name}"] = _made([*common, last], asked.steps, store)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for turn in range(1 + asked.rounds):
            for name, (work, batches) in kinds.items():
                clock, processor, losses = _timed(work, batches)
                if turn == 0:  # the first compiles kernels, and keeps what there is to keep
                    print(f"{name:28} first losses {' '.join(f'{x:.6f}' for x in losses)}", flush=True)
                else:
                    times[name].append((clock, processor))
    tokens = sum(batch.tokens for batch in next(iter(kinds.values()))[1])
    _print(times, tokens)


def _made(overrides: list[str], steps: int, store: Store | None) -> tuple[Work, list[Batch]]:
    """A job at work on the CPU, and some of its batches."""
    job = compose(overrides)
    parts = assemble.sketch(job, cache_dir(), print, whole=True)
    corpus = assemble.rows(job, parts, cache_dir(), print)
    device = torch.device("cpu")
    assemble.furnish(job, parts, device, cache_dir(), print, recomputed=0)
    work = assemble.work(job, parts, device, total=1000)
    work.model.train()
    if store is not None:
        work.loss = KeptLoss(work.loss, assemble.kept_rows(job, parts, corpus, 16, 0, store, work, print))
    return work, [stepping.step_batches(job, corpus, 16, 0, step)[0] for step in range(steps)]


def _timed(work: Work, batches: list[Batch]) -> tuple[float, float, list[float]]:
    clock, processor, losses = time.perf_counter(), time.process_time(), []
    for batch in batches:
        losses.append(float(accumulate(work, [batch])) / batch.supervised)
        clip(work)
        update(work)
    return time.perf_counter() - clock, time.process_time() - processor, losses


def _print(times: dict[str, list[tuple[float, float]]], tokens: int) -> None:
    def rates(found: list[tuple[float, float]]) -> list[float]:
        return [tokens / statistics.median(of) for of in zip(*found, strict=True)]

    base: Any = rates(times["layers=all"])
    print(f"\n{'':28} {'tokens/s':>9} {'ratio':>6} {'by processor time':>18} {'ratio':>6}")
    for name, found in times.items():
        clock, processor = rates(found)
        print(f"{name:28} {clock:9.1f} {clock / base[0]:6.2f} {processor:18.1f} {processor / base[1]:6.2f}")


if __name__ == "__main__":
    main()
