"""One job of the matrix: planned on fake tensors, then run, and its largest level read from the allocator's events."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ftrun import assemble, stepping
from ftrun.compose import compose
from ftrun.data.rows import in_memory
from ftrun.job import Job
from ftrun.memory.device import resolve
from ftrun.memory.events import allocations, resident_bytes
from ftrun.planning.plan import Plan, plan
from ftrun.planning.twin import Twin
from ftrun.runs import cache_dir
from ftrun.train.loop import Progress, Work, train
from ftrun.values import Batch
from tests.families import save_tiny
from tests.memory.cases import SHAPES, Case

_WIDE: dict[str, Any] = {
    "vocab_size": 24576,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}
# name -> (transformers' model_type, what its config says beyond tests/families.py)
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_WIDE, "attention_bias": True, "mlp_bias": True}),
    "gpt2": ("gpt2", {"vocab_size": 24576, "n_embd": 512, "n_head": 8, "n_positions": 2048}),
    "gpt_neox": ("gpt_neox", {k: v for k, v in _WIDE.items() if k != "num_key_value_heads"}),
    "gemma3": ("gemma3_text", {**_WIDE, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 48}),
    "qwen3_moe": ("qwen3_moe", {**_WIDE, "head_dim": 64, "num_experts": 8, "moe_intermediate_size": 256}),
    "phi3": ("phi3", _WIDE),
}
DEPTH = 5  # layers of a small model
LIMIT = 3e9  # bytes: a job that is planned above is refused, not run


@dataclass(frozen=True)
class Measured:
    """Bytes of the measured step. end: what the step's allocations left above its start; 0 where nothing leaks."""

    resident: int
    peak: int
    end: int
    grown: int  # residents after the step less those before it

    @property
    def total(self) -> int:
        """The peak of the whole job."""
        return self.resident + self.peak


@dataclass
class Outcome:
    """A case, planned and measured, in bytes."""

    case: Case
    plan: Plan
    measured: Measured
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """(planned − measured) / measured."""
        return (self.plan.peak_bytes - self.measured.total) / self.measured.total

    def as_dict(self) -> dict[str, Any]:
        """For the JSON report."""
        return {
            "case": asdict(self.case),
            "planned": self.plan.peak_bytes,
            "measured": self.measured.total,
            "error": self.error,
            "at_peak": self.plan.at_peak,
            "end": self.measured.end,
            "grown": self.measured.grown,
            "seconds": self.seconds,
        }


class Bench:
    """Runs cases. folder: where small models and their quantised forms are kept between cases; depth: their layers."""

    def __init__(self, folder: Path, depth: int = DEPTH) -> None:
        self.folder, self.depth = folder, depth

    def job(self, case: Case) -> Job:
        """The case's job, as a user would write it."""
        shape = SHAPES[case.shape]
        dropout = case.method == "lora_dropout"
        given = [
            f"method={'lora' if dropout else case.method}", f"quant={case.quant}", f"optim={case.optim}",
            f"model.dtype={case.dtype}", f"kernels={case.kernels}", f"batch={shape.batch}",
            f"micro_batch={shape.micro_batch}", "steps=2", "device=cpu", "log=none", "eval=none", "refuse=false",
        ]  # fmt: skip
        given += ["dropout=0.1"] if dropout else []
        # experts are one parameter each, which only LoRA tunes
        given += ["targets=attention"] if case.method == "dora" and case.model == "qwen3_moe" else []
        return compose([*given, *([] if case.model == "smollm2" else [f"model.path={self._base(case)}"])])

    def run(self, case: Case) -> Outcome:
        """Plan the case's step and measure it, the second of a real run."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Outcome(case, *self._both(case))

    def _both(self, case: Case) -> tuple[Plan, Measured]:
        job, cache = self.job(case), self._cache(case)
        parts = assemble.sketch(job, cache, _silent, whole=True)
        batches = self.batches(case, parts)
        recomputed = {"none": 0, "all": parts.anatomy.depth, "some": parts.anatomy.depth // 2}[case.checkpointing]
        device = resolve(job.device.typed())
        planned = plan(Twin(job, parts, device), device, batches, recomputed)
        assert planned.peak_bytes < LIMIT, f"{case}: {planned.peak_bytes:,} bytes"
        assemble.furnish(job, parts, torch.device("cpu"), cache, _silent, recomputed)
        work = assemble.work(job, parts, torch.device("cpu"), total=2)
        return planned, measure(work, batches)

    def batches(self, case: Case, parts: assemble.Sketch) -> list[Batch]:
        """The micro-batches of the step: random tokens, the first third of each row not learnt."""
        shape, rng = SHAPES[case.shape], np.random.default_rng(0)
        vocabulary = parts.model.get_input_embeddings().num_embeddings
        share = 4 if case.model == "smollm2" else 1  # it is larger: shorter rows make up for it
        lengths = [max(8, shape.lengths[i % len(shape.lengths)] // share) for i in range(shape.batch)]
        made = [(rng.integers(5, vocabulary, n).tolist(), [0] * (n // 3) + [1] * (n - n // 3)) for n in lengths]
        rows = in_memory(made, tuple(range(vocabulary, vocabulary + parts.tuner.prefix)))
        micro = stepping.batching.micro(list(range(shape.batch)), shape.micro_batch, lengths=rows.lengths)
        return [stepping.batching.collate(rows, part, packed=case.kernels == "fast", pad_id=0) for part in micro]

    def _cache(self, case: Case) -> Path:
        return cache_dir() if case.model == "smollm2" else self.folder

    def _base(self, case: Case) -> Path:
        folder = self.folder / case.model
        if not folder.is_dir():
            transformers.utils.logging.disable_progress_bar()
            family, changes = SMALL[case.model]
            save_tiny(family, folder, self.depth, torch.bfloat16, **changes)
        return folder


def measure(work: Work, batches: list[Batch]) -> Measured:
    """Two steps of the real loop, as ftrun/tasks/session.py measures the second: residents and allocator's events."""
    found: list[Measured] = []

    @contextlib.contextmanager
    def watch(step: int) -> Iterator[None]:
        if step == 0:
            yield
            return
        gc.collect()  # garbage of the first step would be freed within the second, unseen by the profiler
        resident = resident_bytes(_residents(work))
        with allocations() as seen:
            yield
        found.append(Measured(resident, seen.peak, seen.end, resident_bytes(_residents(work)) - resident))

    work.batches, work.watch = lambda start: iter([batches] * (work.total - start)), watch
    for _ in train(work, Progress()):
        pass
    return found[0]


def _residents(work: Work) -> Iterator[torch.Tensor]:
    yield from work.model.parameters()
    yield from work.model.buffers()
    for state in work.optimiser.state.values():
        yield from (v for v in state.values() if isinstance(v, torch.Tensor))


def _silent(message: str) -> None:
    """No messages of the assembly in a table."""
