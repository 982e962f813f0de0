"""python scripts/ranks.py [--steps 8]: jobs of several processes over gloo on this machine, planned and measured.

Prints two tables: 14 two-process jobs, each with the fullest rank's peak, planned and measured, and how far its losses
and final weights are from those of one process that computes in as many threads as each of the two has; beside it how
far that one is from one in as many threads as there are cores (a product of matrices sums in another order there); what
a rank holds of the base over 1, 2 and 4 processes, with its peak planned and measured. Ends with exit code 1 where a
plan is more than 3 % off or a result beyond its bound. A quarter of an hour. What several processes cost in time:
`python scripts/bench --cases ranks`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOUND = 0.03
# of losses; of final weights, as a share of each tensor's norm (Adam divides by a gradient's size: where that is next
# to nothing, its rounding shows)
CLOSE = {"float32": (1e-5, 1e-3), "bfloat16": (1e-2, 5e-2)}
METHODS, STRATEGIES = ("lora", "qlora", "full"), ("ddp", "fsdp")
CASES = [(m, s, r, "float32") for m in METHODS for s in STRATEGIES for r in (1, 4)]
CASES += [("lora", s, 4, "bfloat16") for s in STRATEGIES]
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}


def main() -> int:
    """Both tables; 1 where something is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as made:
        table = Table(Path(made), steps)
        found = [table.job(*case) for case in CASES]
        found += table.halves()
    errors = [abs(error) for error, _ in found]
    print(f"\n{len(errors)} jobs: worst {max(errors):.2%}, median {statistics.median(errors):.2%}")
    return int(max(errors) > BOUND or not all(same for _, same in found))


@dataclass
class Table:
    """The jobs of one model and one file of rows. steps: of each."""

    folder: Path
    steps: int

    def __post_init__(self) -> None:
        self.base, self.rows = model(self.folder / "base"), texts(self.folder / "rows.jsonl")

    def job(self, method: str, strategy: str, at_once: int, dtype: str) -> tuple[float, bool]:
        """A job of two processes against one: (how far off its plan is, whether it came to the same)."""
        job = (f"method={method}", f"micro_batch={at_once}", f"model.dtype={dtype}")
        whole = self.run(f"{method}-{at_once}-{dtype}", *job, "devices=1")
        one = self.run(f"{method}-{at_once}-{dtype}-threads", *job, "devices=1", threads=max(1, cores() // 2))
        two = self.run(f"{method}-{strategy}-{at_once}-{dtype}", *job, "devices=2", f"strategy={strategy}")
        error, said = told(two)
        losses, weights, threads = loss_apart(one, two), weights_apart(one, two), weights_apart(one, whole)
        print(
            f"{method:6} {strategy:5} {at_once} rows at once, {dtype:8}: {said}; against one process losses within "
            f"{losses:.0e}, weights {weights:.1e} (one process in {cores()} threads: {threads:.1e})",
            flush=True,
        )
        return error, losses <= CLOSE[dtype][0] and weights <= CLOSE[dtype][1]

    def halves(self) -> list[tuple[float, bool]]:
        """What a rank holds of the base between steps, and its peak."""
        print("\nthe base on each rank, fsdp")
        found = []
        for method in ("lora", "qlora"):
            for devices in (1, 2, 4):
                sharing = ("strategy=fsdp",) if devices > 1 else ()
                job = (f"method={method}", "micro_batch=2", f"devices={devices}", *sharing)
                out = self.run(f"half-{method}-{devices}", *job)
                steady = json.loads((out / "plan.json").read_text(encoding="utf-8"))["steady"]
                error, said = told(out)
                size = (steady["weights"] + steady["quant_constants"]) / 1e6
                print(f"{method:6} {devices} processes: {size:8.2f} MB of weights; {said}", flush=True)
                found.append((error, True))
        return found

    def run(self, name: str, *more: str, threads: int | None = None) -> Path:
        """The folder of a run, made once. threads: to compute in; None: as many as there are cores, over processes."""
        out = self.folder / name
        if not out.exists():
            common = [f"model.path={self.base}", "model.dtype=float32", "data=jsonl", f"data.path={self.rows}"]
            common += ["data.held_out=0", "seq_len=256", "batch=8", "device=cpu", "eval=none", f"steps={self.steps}"]
            names = {word.partition("=")[0] for word in more}
            command = [*(word for word in common if word.partition("=")[0] not in names), *more, f"out={out}"]
            environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
            words = [sys.executable, "-m", "ftrun", *command]
            done = subprocess.run(words, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
        return out


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def told(out: Path) -> tuple[float, str]:
    """(how far off a run's plan is, the same in words)."""
    memory = json.loads((out / "result.json").read_text(encoding="utf-8"))["memory"]
    planned, measured = memory["planned_peak_bytes"], memory["measured_peak_bytes"]
    error = float(memory["error"])
    return error, f"planned {planned / 1e6:8.2f} MB, measured {measured / 1e6:8.2f} MB ({error:+.2%})"


def loss_apart(one: Path, two: Path) -> float:
    """The largest difference of a step's losses, as a share."""
    first, second = ([m["loss"] for m in metrics(out)] for out in (one, two))
    return max(abs(a - b) / a for a, b in zip(first, second, strict=True))


def weights_apart(one: Path, two: Path) -> float:
    """The largest difference of a tensor, as a share of its norm."""
    from safetensors.torch import load_file

    (first,) = one.glob("*/*model.safetensors")
    own, other = load_file(first), load_file(two / first.relative_to(one))
    assert own.keys() == other.keys()
    return max(float((own[n].double() - other[n].double()).norm() / own[n].double().norm()) for n in own)


def metrics(out: Path) -> list[dict[str, Any]]:
    """A run's steps."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def texts(path: Path) -> Path:
    """Rows of unequal lengths."""
    words = ("red", "blue", "nine", "seven", "cat", "dog", "up", "down", "sun", "moon")
    rows = [
        {
            "question": f"{i}: {' '.join(words[(i * k) % 10] for k in range(1, 4 + i % 40))}?",
            "answer": f"{i % 7} of them",
        }
        for i in range(160)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def model(folder: Path) -> Path:
    """A random model of 24 million weights with the tests' tokenizer."""
    from tests.jobs import tiny_base

    return tiny_base(folder, num_key_value_heads=4, **SIZES)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main())
