"""ours and what people run instead, in turn (A B A B …), each in a fresh process, on the same rows and settings.

    python scripts/bench [--cases NAME ...] [--pairs 3] [--steps 12] [--data FILE] [--out JSON]
    make bench BENCH_DATA=rows.jsonl ARGS="--cases lora --pairs 1"

Prints each run, a table of ratios (real tokens a second, peak memory of the process, held-out loss after the same
tokens, seconds to the same held-out loss), where a step's time goes, and its share of the floor: what the matrix
products alone would take at this machine's measured rate. A case of three pairs takes about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ftrun.runs import cache_dir
from scripts.bench import figures, machine, pairs, ranks, sides, studies, words
from scripts.bench.cases import CASES, USUAL, Case
from scripts.bench.watch import Failed

APART = (studies.NAME, ranks.NAME)  # that are no pairs of sides


def main() -> int:
    """Run the cases asked for; returns the exit code."""
    asked, names, out, broken_down = _asked()
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine.shape(), "cases": {}}
    found["asked"] = vars(asked) | {"set": list(asked.set)}
    print(machine.line(found["machine"]), flush=True)
    failed = []
    with tempfile.TemporaryDirectory(prefix="ftrun-bench-") as made:
        cache = sides.own_cache(Path(made), cache_dir())
        for name in names:
            try:
                if name == studies.NAME:
                    found[name] = _study(asked, Path(made) / name, cache)
                elif name == ranks.NAME:
                    print(f"\n{name}: {ranks.PROCESSES} processes against one", flush=True)
                    found[name] = ranks.run(asked, Path(made) / name, cache, _say)
                else:
                    found["cases"][name] = run(CASES[name], asked, Path(made) / name, cache, broken_down)
            except Failed as error:  # the others are still worth knowing
                print(f"{name}: FAILED: {error}", flush=True)
                failed.append(name)
            if out:
                out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if found["cases"]:
        print(f"\n{found['date']}, medians of {asked.pairs} pairs, {asked.steps} steps, of ratios (lowest–highest):\n")
        print(figures.table({name: case["summary"] for name, case in found["cases"].items()}))
    return 1 if failed else 0


def run(case: Case, asked: pairs.Asked, folder: Path, cache: Path, broken_down: bool) -> dict[str, Any]:
    """One case: its runs, its figures, and where the time goes in our step; prints as it goes."""
    print(f"\n{case.name}: {case.ours} against {case.other}", flush=True)
    place = pairs.prepared(case, asked, folder, cache)
    ours, other = pairs.in_turn(case, asked, place, _say)
    found: dict[str, Any] = {"summary": figures.summary(case, ours, other)}
    found |= {"ours": pairs.as_json(ours), "other": pairs.as_json(other)}
    _say(words.ratios(found["summary"]))
    if broken_down:
        for key, side in (("ours", case.ours), ("other", case.other)):
            if side.program == "ftrun":
                words_of = sides.overrides(pairs.more(side, asked), case, asked.steps, place.rows, asked.model)
                step = pairs.child(place, "breakdown", {"overrides": words_of})
                found[f"step_of_{key}"] = step
                _say(words.breakdown(str(side), step))
        _say(words.counts(found))
    return found


def _study(asked: pairs.Asked, folder: Path, cache: Path) -> dict[str, Any]:
    print(f"\n{studies.NAME}: a study against separate calls", flush=True)
    more = [*asked.set, *([f"model.path={asked.model}"] if asked.model else [])]
    return studies.run(studies.STEPS, folder, cache, more, _say)


def _asked() -> tuple[pairs.Asked, list[str], Path | None, bool]:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[*USUAL, *APART],
        choices=[*CASES, *APART],
        metavar="NAME",
        help=_names(),
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of each run; the first two do not count (default 12)")
    parser.add_argument("--held-out", type=int, default=64, help="rows that no side trains on (default 64)")
    parser.add_argument("--data", help="a file of questions and answers; by default the bundled conversations")
    parser.add_argument("--model", help="a folder with a base; by default smollm2-135m")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further overrides for ftrun")
    parser.add_argument("--out", type=Path, help="write every figure to this file, as JSON")
    parser.add_argument("--no-breakdown", action="store_true", help="leave out where a step's time goes")
    a = parser.parse_args()
    if a.steps < 4 or a.pairs < 1 or a.held_out < 1:
        parser.error("expected --steps of 4 or more, --pairs and --held-out of 1 or more")
    data = str(Path(a.data).expanduser().absolute()) if a.data else None
    asked = pairs.Asked(a.pairs, a.steps, a.held_out, data, a.model, tuple(a.set))
    return asked, a.cases, a.out, not a.no_breakdown


def _names() -> str:
    return "of " + ", ".join(f"{n}{'' if n in USUAL else ' (not by default)'}" for n in CASES) + f", {', '.join(APART)}"


def _say(text: str) -> None:
    if text:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
