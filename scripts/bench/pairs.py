"""A case's runs: ours, the other, ours, the other, …, each in a fresh process."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scripts.bench import sides
from scripts.bench.cases import Case, Side
from scripts.bench.figures import Run, rate
from scripts.bench.watch import Failed, watch

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What the command line asks for. rows: a data file, else the bundled data; model: a base's folder, else the
    default one; set: further overrides for ftrun.
    """

    pairs: int
    steps: int
    held_out: int
    rows: str | None
    model: str | None
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a case's runs happen: its rows, its runs' folders, and what children are told."""

    rows: Path
    runs: Path
    env: dict[str, str]


def prepared(case: Case, asked: Asked, folder: Path, cache: Path) -> Place:
    """The case's rows, written by a process of its own. Raises Failed."""
    place = Place(folder / "rows", folder / "runs", sides.environment(cache))
    for path in (place.rows, place.runs):
        path.mkdir(parents=True)
    words = {"case": case.name, "steps": asked.steps, "held_out": asked.held_out, "rows": asked.rows}
    child(place, "prepare", {**words, "out": str(place.rows), "model": asked.model})
    return place


def in_turn(case: Case, asked: Asked, place: Place, say: Say) -> tuple[list[Run], list[Run]]:
    """The runs of both sides. The first pair's also save on the way, and their held-out losses are taken."""
    found: tuple[list[Run], list[Run]] = ([], [])
    for pair in range(asked.pairs):
        for runs, side in zip(found, (case.ours, case.other), strict=True):
            judged = case.equal and pair == 0
            run = one(case, more(side, asked), asked, place, pair, judged)
            runs.append(run)
            held = "".join(f"  held-out {loss:.4f} at {step}" for step, loss in run.held_out.items())
            say(f"  {pair + 1}  {run.side:36} {run.rate:8.1f} tokens/s  {run.peak_bytes / 1e9:6.2f} GB{held}")
    return found


def more(side: Side, asked: Asked) -> Side:
    """The side with the command line's further overrides, where it is ftrun's."""
    return replace(side, more=(*side.more, *asked.set)) if side.program == "ftrun" else side


def one(case: Case, side: Side, asked: Asked, place: Place, pair: int, judged: bool) -> Run:
    """One run of one side. judged: it saves halfway, and its adapters are evaluated. Raises Failed."""
    out = place.runs / f"{pair}-{'ours' if side.program == 'ftrun' else side.program}-{_name(side)}"
    total = asked.steps * case.epochs
    saves = [-(-total // 2)] if judged else []  # its next multiple is the end or beyond it
    command = sides.command(side, case, asked.steps, place.rows, out, asked.model, saves)
    seen = watch(command, out / "metrics.jsonl", out.with_suffix(".log"), place.runs, place.env)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = [line["tokens"] for line in lines]
    _same(lines, json.loads((place.rows / "facts.json").read_text(encoding="utf-8")), side)
    speed = rate(tokens, seen.ends, case.first(asked.steps), saves)
    run = Run(str(side), pair, tokens, seen.ends, seen.peak, seen.seconds, speed, _losses(lines, out))
    if judged:
        run.held_out = held_out(side, place, sides.adapters(side, out, saves, total))
    shutil.rmtree(out)
    return run


def _name(side: Side) -> str:
    return "".join(c if c.isalnum() else "-" for c in str(side))


def _same(lines: Sequence[dict[str, Any]], facts: dict[str, Any], side: Side) -> None:
    """Raises Failed unless each step had the tokens, real and supervised, that the rows say."""
    for name, wanted in (("tokens", facts["tokens"]), ("supervised_tokens", facts["supervised"])):
        if (found := [line[name] for line in lines]) != wanted:
            raise Failed(f"{side}: {name} of the steps are {found}, expected {wanted}: not the same rows")


def _losses(lines: Sequence[dict[str, Any]], out: Path) -> list[float]:
    note = out / "note.json"
    if note.exists():
        return json.loads(note.read_text(encoding="utf-8"))["losses"]
    return [line["loss"] for line in lines]


def held_out(side: Side, place: Place, adapters: dict[int, Path]) -> dict[int, float]:
    """The held-out loss after so many steps, the base's own (0) among them."""
    facts = json.loads((place.rows / "facts.json").read_text(encoding="utf-8"))
    words = {"model": facts["model"], "quant": side.quant, "rows": str(place.rows / "held_out.jsonl")}
    found = child(place, "held_out", {**words, "adapters": [str(path) for path in adapters.values()]})
    return {0: found["base"], **dict(zip(adapters, found["adapters"], strict=True))}


def child(place: Place, name: str, words: dict[str, Any]) -> Any:
    """One of this package's programs: what the last line it prints says in JSON, None where it prints none."""
    command = sides.module(name, json.dumps(words))
    done = subprocess.run(command, cwd=place.runs, env=place.env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{name}: {(done.stderr or done.stdout).strip()[-2000:]}")
    last = done.stdout.strip().rpartition("\n")[2]
    return json.loads(last) if last.startswith("{") else None


def as_json(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The raw figures."""
    return [asdict(run) for run in runs]
