"""The command line of each side, with the same settings said in each one's own words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.bench import cases
from scripts.bench.cases import Case, Side
from scripts.bench.watch import Failed

ROOT = Path(__file__).resolve().parents[2]
_NEVER = 1_000_000  # steps


def environment(cache: Path) -> dict[str, str]:
    """A child's: this repository's code, no network, a cache of its own for tokenised rows. What is set stays set."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    return {**quiet, **os.environ, "PYTHONPATH": path, "FTRUN_CACHE": str(cache)}


def module(name: str, *words: str) -> list[str]:
    """The command that runs one of this package's programs."""
    return [sys.executable, "-m", f"scripts.bench.{name}", *words]


def call(words: Sequence[str], env: dict[str, str]) -> float:
    """ftrun WORDS, to its end; returns its seconds. Raises Failed, with the end of what it said."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "ftrun", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"ftrun {' '.join(words)[:300]}: {(done.stderr or done.stdout).strip()[-800:]}")
    return time.perf_counter() - started


def overrides(side: Side, case: Case, steps: int, rows: Path, model: str | None = None) -> list[str]:
    """ftrun's command line but for `out`. rows: the folder that `prepare.py` filled; model: a folder with a base."""
    named = [f"model.path={model}"] if model else []
    return [
        *named,
        f"method={'q' if side.quant == 'nf4' else ''}{side.method}",
        f"rank={cases.RANK}", f"alpha={cases.ALPHA}", "dropout=0", f"layers={side.layers}",
        "data=jsonl", f"data.path={rows / 'train.jsonl'}", "data.held_out=0", "data.overlong=error",
        f"seq_len={cases.SEQ_LEN}", f"batch={case.batch}", f"steps={steps * case.epochs}",
        f"checkpointing={side.checkpointing}", *_optimiser(),
        "eval=none", "log=none", "device=cpu", *side.more,
    ]  # fmt: skip


def _optimiser() -> list[str]:
    return [
        "optim=adamw", f"lr={cases.RATE}", f"optim.betas=[{cases.BETAS[0]},{cases.BETAS[1]}]", f"optim.eps={cases.EPS}",
        f"optim.weight_decay={cases.WEIGHT_DECAY}", f"optim.clip={cases.CLIP}", "optim.schedule=constant",
        "optim.warmup=0",
    ]  # fmt: skip


def command(
    side: Side, case: Case, steps: int, rows: Path, out: Path, model: str | None, saves: Sequence[int]
) -> list[str]:
    """What to run. It leaves a line in `out`/metrics.jsonl for each step, and `out`/adapter in PEFT's format.

    saves: after how many steps it writes a checkpoint: of none or one.
    """
    every = saves[0] if saves else _NEVER
    if side.program == "ftrun":
        words = overrides(side, case, steps, rows, model)
        return [sys.executable, "-m", "ftrun", *words, f"save_every={every}", f"out={out}"]
    facts = json.loads((rows / "facts.json").read_text(encoding="utf-8"))
    asked = {"method": side.method, "quant": side.quant, "checkpointing": side.checkpointing == "all"}
    asked |= {"model": facts["model"], "steps": steps * case.epochs, "batch": case.batch, "save_every": every}
    asked |= {"rows": str(rows / "peer.jsonl"), "out": str(out)}
    return module(f"peer_{side.program}", json.dumps(asked))


def adapters(side: Side, out: Path, saves: Sequence[int], total: int) -> dict[int, Path]:
    """The run's adapters in PEFT's format, by the steps they have had."""
    if side.program != "ftrun":
        return {step: out / "trainer" / f"checkpoint-{step}" for step in saves} | {total: out / "adapter"}
    found = {}
    for step in saves:  # a checkpoint's trained weights have the adapter's names
        found[step] = out / f"adapter-{step}"
        found[step].mkdir()
        shutil.copy(out / "adapter" / "adapter_config.json", found[step])
        weights = out / "checkpoints" / f"step-{step}" / "trained.safetensors"
        shutil.copy(weights, found[step] / "adapter_model.safetensors")
    return found | {total: out / "adapter"}


def own_cache(folder: Path, users: Path) -> Path:
    """A cache in `folder` that shares the user's converted and quantised bases, and keeps rows to itself."""
    cache = folder / "cache"
    cache.mkdir()
    for name in ("models", "quantised", "hashes", "compile"):
        (users / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        (cache / name).symlink_to(users / name)
    return cache
