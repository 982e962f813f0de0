"""What a study costs beside its training: short trials in one, against as many separate calls of the command.

The bound: the study's wall time over the trials' own training time and one start-up. A trial's training time is that of
its steps alone (result.json), a start-up what one separate call takes beside its steps. `--set steps=10` for fewer
steps of each trial than 30, where those take long.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.bench import sides

NAME = "study"
STEPS = 30  # of each trial
AXES = ("rank=4,8,16,32", "lr=1e-4,2e-4")
_POINTS = tuple((r, l) for r in ("rank=4", "rank=8", "rank=16", "rank=32") for l in ("lr=1e-4", "lr=2e-4"))  # noqa: E741


def run(steps: int, folder: Path, cache: Path, more: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """One study and its eight jobs alone, each of so many steps; the figures. more: further overrides."""
    job = ["method=lora", f"steps={steps}", "eval=none", "log=none", *more]
    env = sides.environment(cache)
    sides.call(["steps=1", *job[:1], *job[2:], f"out={folder / 'warm'}"], env)  # caches are warm for both
    wall = sides.call(["-m", *AXES, *job, f"out={folder / 'study'}"], env)
    runs = sorted((folder / "study" / "runs").iterdir())
    inside, taken = [_seconds(run) for run in runs], int(_result(runs[0])["steps"])
    apart, alone = [], []
    for number, point in enumerate(_POINTS):
        out = folder / f"alone-{number}"
        apart.append(sides.call([*point, *job, f"out={out}"], env))
        alone.append(_seconds(out))
    start_up = statistics.median(w - t for w, t in zip(apart, alone, strict=True))
    made = {
        "trials": len(inside),
        "steps": taken,
        "study_seconds": wall,
        "training_seconds": sum(inside),
        "start_up_seconds": start_up,
        "overhead": wall / (sum(inside) + start_up),
        "separate_seconds": sum(apart),
        "against_separate": sum(apart) / wall,
    }
    say(
        f"  {len(inside)} trials of {taken} steps: {wall:.1f} s; their training {sum(inside):.1f} s and one start-up "
        f"{start_up:.1f} s: × {made['overhead']:.3f}. As {len(apart)} separate calls {sum(apart):.1f} s: "
        f"× {made['against_separate']:.2f}"
    )
    return made


def _seconds(run: Path) -> float:
    return float(_result(run)["seconds"])


def _result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return found
