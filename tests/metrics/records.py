"""Records of a run that did not take place."""

from __future__ import annotations

from typing import Any

from ftrun.values import EvalRecord, StepRecord


def step(number: int, loss: float = 2.0, **changes: Any) -> StepRecord:
    values = {"lr": 1e-4, "grad_norm": 0.5, "tokens": 900, "supervised_tokens": 400, "tokens_per_s": 812.0}
    sizes = {"mem_allocated": 1_000_000_000, "mem_peak": 1_400_000_000, "seconds": 1.5}
    return StepRecord(**{"step": number, "loss": loss, **values, **sizes, **changes})


def evaluation(number: int, loss: float = 2.0, **changes: Any) -> EvalRecord:
    return EvalRecord(**{"step": number, "loss": loss, "perplexity": 7.4, "tokens": 300, "seconds": 2.0, **changes})


JOB: dict[str, Any] = {
    "choices": {"model": "smollm2-135m", "method": "qlora", "log": "none"},
    "model": {"path": None, "source": "package", "arch": {"hidden_size": 576}},
    "method": {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.0},
    "log": {"kind": "none"},
    "rank": 16,
    "lr": 2e-4,
    "seed": 0,
    "name": None,
}

RESULT: dict[str, Any] = {
    "status": "finished",
    "steps": 60,
    "tokens": 54_000,
    "seconds": 133.2,
    "tokens_per_s": 405.4,
    "eval": {"before": {"loss": 3.1, "perplexity": 22.2}, "after": {"loss": 2.1, "perplexity": 8.17}},
    "retention": {"before": 2.814, "after": 2.951, "rise": 0.137, "tokens": 900},
    "latency": {"tokens": 32, "base_ms": 9.81, "unmerged_ms": 12.14, "merged_ms": None, "merges": False},
    "memory": {"planned_peak_bytes": 1_410_000_000, "measured_peak_bytes": 1_400_000_000},
    "samples": [{"prompt": "What is a CPU?", "before": "No.", "after": "A central\nprocessing unit."}],
}
