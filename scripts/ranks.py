"""python scripts/ranks.py [--steps 8]: jobs of several processes over gloo on this machine, planned and measured.

Prints three tables: 12 two-process jobs with the fullest rank's peak, planned and measured; the bytes of the base that
a rank holds over 1, 2 and 4 processes; tokens/s of two processes against one on as many cores. Ends with exit code 1
where a plan is more than 3 % off. Some minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BOUND = 0.03
CASES = [(m, s, r) for m in ("lora", "qlora", "full") for s in ("ddp", "fsdp") for r in (1, 4)]
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}


def main() -> int:
    """All three tables; 1 where a plan is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        base, rows = model(folder / "base"), texts(folder / "rows.jsonl")
        errors = [matrix(folder, base, rows, steps, *case) for case in CASES]
        halves(folder, base, rows)
        speeds(folder, base, rows, steps)
    print(f"\n{len(errors)} jobs: worst {max(map(abs, errors)):.2%}, median {statistics.median(map(abs, errors)):.2%}")
    return int(max(map(abs, errors)) > BOUND)


def matrix(folder: Path, base: Path, rows: Path, steps: int, method: str, strategy: str, at_once: int) -> float:
    """One job of two processes; returns how far off its plan is."""
    out = folder / f"{method}-{strategy}-{at_once}"
    found = result(
        out, base, rows, f"method={method}", f"strategy={strategy}", f"micro_batch={at_once}", f"steps={steps}"
    )
    memory = found["memory"]
    planned, measured = memory["planned_peak_bytes"], memory["measured_peak_bytes"]
    print(
        f"{method:6} {strategy:5} {at_once} rows at once: planned {planned / 1e6:8.2f} MB, measured "
        f"{measured / 1e6:8.2f} MB ({memory['error']:+.2%})",
        flush=True,
    )
    return float(memory["error"])


def halves(folder: Path, base: Path, rows: Path) -> None:
    """What a rank holds of the base between steps."""
    print("\nbytes of the base on each rank between steps (planned)")
    for method in ("lora", "qlora"):
        for devices in (1, 2, 4):
            sharing = ["strategy=fsdp", f"devices={devices}"] if devices > 1 else []
            plan = planned(base, rows, f"method={method}", "batch=8", "micro_batch=2", *sharing)
            steady = plan["steady"]
            size = steady["weights"] + steady["quant_constants"]
            print(
                f"{method:6} {devices} processes: {size / 1e6:8.2f} MB, peak {plan['peak_bytes'] / 1e6:8.2f} MB",
                flush=True,
            )


def speeds(folder: Path, base: Path, rows: Path, steps: int) -> None:
    """Two processes of one thread against one of two."""
    print("\ntokens/s")
    one = result(folder / "one", base, rows, "method=lora", f"steps={3 * steps}", "devices=1")["tokens_per_s"]
    print(f"1 process: {one:,.0f}", flush=True)
    for strategy in ("ddp", "fsdp"):
        found = result(
            folder / f"two-{strategy}", base, rows, "method=lora", f"strategy={strategy}", f"steps={3 * steps}"
        )
        two = found["tokens_per_s"]
        print(f"2 processes, {strategy}: {two:,.0f}, × {two / one:.2f}", flush=True)


def result(out: Path, base: Path, rows: Path, *more: str) -> dict[str, Any]:
    """A run's result.json."""
    devices = [] if any(m.startswith("devices=") for m in more) else ["devices=2"]
    run([*common(base, rows), *devices, *more, f"out={out}"])
    return dict(json.loads((out / "result.json").read_text(encoding="utf-8")))


def planned(base: Path, rows: Path, *more: str) -> dict[str, Any]:
    """ftrun plan's answer."""
    made = run(["plan", *common(base, rows), *more, "format=json"])
    return dict(json.loads(made))


def run(arguments: Sequence[str]) -> str:
    """ftrun's standard output; raises where it fails."""
    done = subprocess.run([sys.executable, "-m", "ftrun", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    return done.stdout


def common(base: Path, rows: Path) -> list[str]:
    """What all jobs share."""
    first = [f"model.path={base}", "model.dtype=float32", "data=jsonl", f"data.path={rows}", "data.held_out=0"]
    return [*first, "seq_len=256", "batch=8", "device=cpu", "eval=none"]


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
    """A random model of 25 million weights with the tests' tokenizer."""
    from tests.jobs import tiny_base

    return tiny_base(folder, num_key_value_heads=4, **SIZES)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main())
