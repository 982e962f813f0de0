"""What several processes are worth on this machine: two of them against one on as many cores, and the share of a step
in which a message is under way.

One process computes with all cores, each of two with half of them; rows, steps and settings are those of the case
`lora`, the loss of each step the same. Over gloo on one machine nothing is gained: the cores are the same. What it
says is what sharing costs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.bench import pairs, sides
from scripts.bench.cases import CASES, WARM, Side
from scripts.bench.figures import spread, times
from scripts.bench.watch import Failed

NAME = "ranks"
PROCESSES = 2
KINDS = {"one": ("devices=1",)} | {s: (f"devices={PROCESSES}", f"strategy={s}") for s in ("ddp", "fsdp")}
_CLOSE = 2e-2  # a bfloat16 step's loss, however its rows are shared out


def run(asked: pairs.Asked, folder: Path, cache: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The runs of each kind in turn, then where the messages' time goes; the figures. Raises Failed."""
    case = CASES["lora"]
    place = pairs.prepared(case, asked, folder, cache)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    first: list[float] = []
    for pair in range(asked.pairs):
        for kind, more in KINDS.items():
            rate, losses = _taken(_words(more, asked, place), place, place.runs / f"{pair}-{kind}")
            found[kind].append(rate)
            first = first or losses
            _same(first, losses, kind)
            say(f"  {pair + 1}  {kind:5} {rate:8.1f} tokens/s")
    made: dict[str, Any] = {"tokens_per_s": found}
    for kind in KINDS:
        if kind == "one":
            continue
        ratio = spread([two / one for two, one in zip(found[kind], found["one"], strict=True)])
        told = {"overrides": _words(KINDS[kind], asked, place), "processes": PROCESSES}
        wire = pairs.child(place, "wire", {**told, "out": str(place.runs / f"{kind}.json")})
        made[kind] = {"ratio": ratio, "wire": wire}
        say(line(kind, ratio, wire))
    return made


def line(kind: str, ratio: dict[str, float], wire: dict[str, Any]) -> str:
    """One kind's figures in words."""
    return (
        f"  {PROCESSES} processes, {kind}, against one: × {times(ratio)}; "
        f"{wire['messages']:.0f} messages a step, under way in {wire['share']:.1%} of it "
        f"({wire['wire_s'] * 1e3:.0f} of {wire['profiled_s'] * 1e3:.0f} ms)"
    )


def _words(more: Sequence[str], asked: pairs.Asked, place: pairs.Place) -> list[str]:
    side = replace(Side("ftrun"), more=(*more, *asked.set))
    return sides.overrides(side, CASES["lora"], asked.steps, place.rows, asked.model)


def _taken(words: Sequence[str], place: pairs.Place, out: Path) -> tuple[float, list[float]]:
    """(tokens a second from step WARM on, the loss of each step) of one run."""
    sides.call([*words, f"out={out}"], place.env)
    steps = [json.loads(text) for text in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rate = sum(s["tokens"] for s in steps[WARM:]) / sum(s["seconds"] for s in steps[WARM:])
    return rate, [s["loss"] for s in steps]


def _same(one: Sequence[float], other: Sequence[float], kind: str) -> None:
    """Raises Failed unless the steps' losses are those of one process."""
    far = max(abs(a - b) / a for a, b in zip(one, other, strict=True))
    if far > _CLOSE:
        raise Failed(f"{kind}: a step's loss is {far:.1%} off that of one process")
