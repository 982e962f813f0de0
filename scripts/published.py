"""Published GPU measurements against the planner's tracker: the error of every row, and by source.

    python scripts/published.py [--all | --rows ID ...] [--held] [--json FILE] [--data CSV]

Each row's job is its peer's own code (transformers and PEFT on fake tensors; what its version did otherwise is written
down in scripts/peers), followed by ftrun's tracker. Without options a spread sample, two minutes or so; --all takes
about twenty on two cores. Half of all jobs, by hash, were kept from view while rules were made; --held runs them alone.
Exits with 1 where the rows of one GPU and completeness A miss their bounds: median 0.5 %, 95th percentile 2 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from peers import attention, rows
from peers.rows import Row
from peers.step import Figures, measure

DATA = Path(__file__).parent.parent / "tests" / "data" / "published_memory.csv"
MEDIAN, P95 = 0.5, 2.0  # per cent
SAMPLE = (
    *("fms-017", "fms-062", "fms-100", "fms-119", "fms-174", "fms-054"),
    *("fitcheck-011", "fitcheck-013", "fitcheck-028", "fitcheck-031", "fitcheck-034", "fitcheck-059", "fitcheck-064"),
)


@dataclass(frozen=True)
class Score:
    """One row's errors, in per cent of what was published; None where that is unpublished."""

    row: Row
    figures: Figures
    allocated: float | None
    reserved: float | None
    process: float | None

    def line(self) -> str:
        """The row as printed."""
        cells, figures = self.row.cells, self.figures
        parts = [f"{cells['model'].split('/')[-1][:24]:24} {cells['method']:5} {self.row.framework[-20:]:20}"]
        parts.append(f"{cells['micro_batch']:>2} x {cells['seq_len'][:4]:4} {'held' if self.row.held_back else 'seen'}")
        parts.append(f"{figures.allocated / 1e9:8.3f}e9 {_percent(self.allocated)}")
        parts.append(f"reserved {_percent(self.reserved)} process {_percent(self.process)} peak in {figures.label}")
        return f"{self.row.id:13} " + "  ".join(parts)


def _percent(error: float | None) -> str:
    return "     –  " if error is None else f"{error:+7.2f}%"


def _error(planned: int, published: float | None) -> float | None:
    return None if published is None else (planned / published - 1) * 100


def main() -> int:
    """Runs what was asked for; the exit code."""
    warnings.filterwarnings("ignore")
    options = _options()
    attention.register()
    everything = rows.read(options.data)
    chosen = _choose(everything, options)
    scores, left_out = _run(chosen, options.quick)
    _report(scores)
    if left_out:
        print("\nLeft out:")
        for why, count in Counter(left_out.values()).most_common():
            print(f"  {count:3}  {why}")
    if options.json:
        options.json.write_text(json.dumps([_record(s) for s in scores], indent=1), encoding="utf-8")
    return 0 if _holds(scores) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every row that can be modelled")
    parser.add_argument("--held", action="store_true", help="only the rows that were held back")
    parser.add_argument("--seen", action="store_true", help="only the rows that were looked at")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ID")
    parser.add_argument(
        "--quick", action="store_true", help="one step instead of two: half the time, cached blocks differ"
    )
    parser.add_argument("--grade", default="AB", help="completeness of the rows, as A or AB")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    return parser.parse_args()


def _choose(everything: list[Row], options: argparse.Namespace) -> list[Row]:
    if options.rows:
        return [r for r in everything if r.id in options.rows]
    if not (options.all or options.held or options.seen):
        return [r for r in everything if r.id in SAMPLE]
    wanted = [r for r in everything if r.cells["completeness"] in options.grade]
    wanted = [r for r in wanted if not options.held or r.held_back]
    return [r for r in wanted if not options.seen or not r.held_back]


def _run(chosen: list[Row], quick: bool) -> tuple[list[Score], dict[str, str]]:
    """(scores, why a row is left out by id); rows of one job share its figures."""
    scores: list[Score] = []
    left_out: dict[str, str] = {}
    done: dict[str, Figures] = {}
    for row in chosen:
        job = rows.job(row)
        if isinstance(job, str):
            left_out[row.id] = job
            continue
        started = time.perf_counter()
        if repr(job) not in done:
            done[repr(job)] = measure(job, quick)
        figures = done[repr(job)]
        errors = [
            _error(f, p)
            for f, p in (
                (figures.allocated, row.allocated),
                (figures.reserved, row.reserved),
                (figures.process, row.process),
            )
        ]
        scores.append(Score(row, figures, *errors))
        print(f"{scores[-1].line()}  {time.perf_counter() - started:.0f} s", flush=True)
    return scores, left_out


def _report(scores: list[Score]) -> None:
    groups: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        grade = score.row.cells["completeness"]
        side = "held back" if score.row.held_back else "looked at"
        groups[f"{score.row.source}: completeness {grade}, {side}"].append(score)
        groups[f"~all of completeness {grade}, {side}"].append(score)
        groups[f"~all of completeness {grade}"].append(score)
    print("\nAbsolute error of the allocated peak, per cent: median, 95th percentile, worst")
    for name, group in sorted(groups.items()):
        _summary(name.lstrip("~"), [s.allocated for s in group])
    print("\nReserved by the allocator, and the process as nvidia-smi sees it")
    for family in sorted({s.row.family for s in scores}):
        members = [s for s in scores if s.row.family == family]
        _summary(f"{family}: reserved", [s.reserved for s in members])
        _summary(f"{family}: process", [s.process for s in members])
    off = [s for s in scores if s.allocated is not None and abs(s.allocated) > 2]
    if off:
        print("\nOff by more than 2 %:")
        for score in off:
            print(f"  {score.row.id}  {_percent(score.allocated)}  {rows.EXPLAINED.get(score.row.id, 'unexplained')}")


def _summary(name: str, errors: list[float | None]) -> None:
    known = sorted(abs(e) for e in errors if e is not None)
    if known:
        p95 = known[min(len(known) - 1, int(0.95 * len(known)))]
        print(f"  {name:72} {len(known):3} rows  {statistics.median(known):6.2f} {p95:6.2f} {known[-1]:6.2f}")


def _record(score: Score) -> dict[str, object]:
    return {
        "id": score.row.id,
        "held_back": score.row.held_back,
        "error_percent": score.allocated,
        "reserved_error_percent": score.reserved,
        "process_error_percent": score.process,
        "planned_bytes": score.figures.allocated,
    }


def _holds(scores: list[Score]) -> bool:
    errors = sorted(abs(s.allocated) for s in scores if s.allocated is not None and s.row.cells["completeness"] == "A")
    if not errors:
        return True
    return statistics.median(errors) <= MEDIAN and errors[min(len(errors) - 1, int(0.95 * len(errors)))] <= P95


if __name__ == "__main__":
    sys.exit(main())
