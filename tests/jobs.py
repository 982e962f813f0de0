"""Small real jobs for tests: a tiny random model in a folder, rows of text in a file, a run folder."""

from __future__ import annotations

import json
from pathlib import Path

from ftrun.compose import compose
from ftrun.job import Job
from tests.families import save_tiny

WORDS = ("red", "blue", "nine", "seven", "cat", "dog", "up", "down", "sun", "moon")


def write_rows(path: Path, count: int = 40) -> Path:
    """A jsonl of questions and answers of unequal lengths, all of them different."""
    rows = []
    for i in range(count):
        words = [WORDS[(i * 7 + k * 3) % len(WORDS)] for k in range(1 + i % 5)]
        rows.append({"question": f"{i}: {' '.join(words)}?", "answer": f"{' '.join(reversed(words))} {i}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_base(folder: Path, family: str = "llama", **changes: object) -> Path:
    """A float32 random model of two layers; widths that every quantiser's blocks divide."""
    if not (folder / "config.json").exists():
        sizes = {} if family in ("gpt2", "opt") else {"intermediate_size": 128}
        save_tiny(family, folder, **{**sizes, **changes})
    return folder


def overrides(base: Path, rows: Path, *more: str) -> list[str]:
    """The command line of a tiny job; what `more` names comes last and rules."""
    common = [
        f"model.path={base}",
        "model.dtype=float32",
        "data=jsonl",
        f"data.path={rows}",
        "data.held_out=4",
        "eval.max_new_tokens=4",
        "seq_len=128",
        "batch=4",
        "device=cpu",
    ]
    named = {m.partition("=")[0] for m in more} | ({"eval.max_new_tokens"} if "eval=none" in more else set())
    return [*(c for c in common if c.partition("=")[0] not in named), *more]


def tiny_job(tmp_path: Path, *more: str, family: str = "llama") -> Job:
    """A composed tiny job, its folder at tmp_path/run unless `more` names another."""
    base, rows = tiny_base(tmp_path / family, family), tmp_path / "rows.jsonl"
    if not rows.exists():
        write_rows(rows)
    chosen = next((m.partition("=")[2] for m in more if m.startswith(("data=", "recipe="))), "jsonl")
    if chosen != "jsonl":  # another kind of data, or a recipe's own
        common = [c for c in overrides(base, rows, *more) if c not in ("data=jsonl", f"data.path={rows}")]
        return compose([*common, f"out={tmp_path / 'run'}"])
    out = [] if any(m.startswith("out=") for m in more) else [f"out={tmp_path / 'run'}"]
    return compose(overrides(base, rows, *out, *more))
