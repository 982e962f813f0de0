"""What a step costs against its sizes: tokens a row, tokens a step, and the vocabulary.

    python scripts/sizes.py [--rounds 3] [--only rows|tokens|vocabulary]

LoRA of rank 16 on all linear layers, every token learnt, nothing recomputed. For each size: real tokens a second (the
median of `rounds` steps, the sizes in turn), the step's peak as planned and as the allocator's own events have it. Rows
and tokens: the default model; the vocabulary: four layers of its shape with random weights. Some minutes on two cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ftrun import assemble, stepping
from ftrun.compose import compose
from ftrun.memory.events import allocations, resident_bytes
from ftrun.memory.host import keep_pages
from ftrun.models.base import open_base
from ftrun.planning.twin import Twin
from ftrun.runs import cache_dir
from ftrun.train.loop import Work, accumulate, clip, update
from ftrun.values import Batch

STEP = 8192  # tokens a step, where rows grow
ROWS = (256, 512, 1024, 2048, 4096)
TOKENS = (1024, 2048, 4096, 8192)  # in rows of 512
VOCABULARIES = (8192, 49152, 131072, 262144)


class Ready:
    """A model at work on one batch of filled rows."""

    def __init__(self, rows: int, length: int, *overrides: str) -> None:
        common = ("method=lora", "rank=16", "checkpointing=none", "eval=none", f"batch={rows}", f"micro_batch={rows}")
        job = compose([*common, f"seq_len={length}", "optim.warmup=0", *overrides])
        self.parts = assemble.sketch(job, cache_dir(), print, whole=True)
        self.batch: Batch = stepping.batching.filled(rows, length, packed=True)
        self.planned = Twin(job, self.parts).step([self.batch], 0).peak.peak
        assemble.furnish(job, self.parts, torch.device("cpu"), cache_dir(), lambda text: None, recomputed=0)
        self.work: Work = assemble.work(job, self.parts, torch.device("cpu"), total=100)
        self.parts.model.train()
        self.step()  # the optimiser's state, and whatever is made once a size
        self.seconds: list[float] = []

    def step(self) -> None:
        """One optimiser step."""
        accumulate(self.work, [self.batch])
        clip(self.work)
        update(self.work)

    def timed(self) -> None:
        """One step, its time noted."""
        started = time.perf_counter()
        self.step()
        self.seconds.append(time.perf_counter() - started)

    def measured(self) -> int:
        """The peak of a step in bytes, by the allocator's events."""
        gc.collect()
        state = [t for s in self.work.optimiser.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        resident = resident_bytes([*self.work.model.parameters(), *self.work.model.buffers(), *state])
        with allocations() as seen:
            self.step()
        return resident + seen.peak

    def line(self) -> dict[str, Any]:
        """The figures."""
        measured = self.measured()
        return {
            "tokens_per_s": self.batch.tokens / statistics.median(self.seconds),
            "planned": self.planned.total,
            "measured": measured,
            "weights": self.planned.by_role["weights"],
            "logits": self.planned.by_role["logits"],
        }


def table(title: str, sizes: dict[int, dict[str, Any]], per: dict[int, int]) -> None:
    """Print the sizes' figures, one a line; per: what a size's bytes beside the weights are divided by."""
    print(f"\n{title:>12}  tokens/s   planned  measured    error  weights   logits  other bytes a token")
    for size, f in sizes.items():
        error = (f["planned"] - f["measured"]) / f["measured"]
        other = (f["measured"] - f["weights"] - f["logits"]) / per[size]
        sums = "".join(f"{f[k] / 1e9:>9.3f}" for k in ("planned", "measured"))
        print(f"{size:>12}{f['tokens_per_s']:>10,.0f} {sums} {error:>8.3%}", end="")
        print(f"{f['weights'] / 1e9:>9.3f}{f['logits'] / 1e9:>9.3f}{other:>12,.0f}")


def run(ready: dict[int, Ready], rounds: int) -> dict[int, dict[str, Any]]:
    """The sizes in turn, `rounds` times; then each one's peak."""
    for _ in range(rounds):
        for one in ready.values():
            one.timed()
    return {size: one.line() for size, one in ready.items()}


def with_vocabulary(size: int, folder: Path) -> Path:
    """Four layers of the default model's shape, with random weights."""
    config = LlamaConfig(
        vocab_size=size, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    path = folder / str(size)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    base = open_base(compose([]).model.typed(), "smollm2-135m", cache_dir(), print)
    base.fetch()
    AutoTokenizer.from_pretrained(base.folder).save_pretrained(path)
    return path


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("rows", "tokens", "vocabulary"))
    parser.add_argument("--out", type=Path, help="write the figures to this file, as JSON")
    asked = parser.parse_args()
    keep_pages()
    found: dict[str, Any] = {}
    if asked.only in (None, "rows"):
        found["rows"] = run({n: Ready(STEP // n, n) for n in ROWS}, asked.rounds)
        table("tokens a row", found["rows"], dict.fromkeys(ROWS, STEP))
    if asked.only in (None, "tokens"):
        found["tokens"] = run({n: Ready(n // 512, 512) for n in TOKENS}, asked.rounds)
        table("tokens", found["tokens"], {n: n for n in TOKENS})
    if asked.only in (None, "vocabulary"):
        with tempfile.TemporaryDirectory() as made:
            folders = {n: with_vocabulary(n, Path(made)) for n in VOCABULARIES}
            found["vocabulary"] = run({n: Ready(4, 512, f"model.path={p}") for n, p in folders.items()}, asked.rounds)
        table("vocabulary", found["vocabulary"], dict.fromkeys(VOCABULARIES, 2048))
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
