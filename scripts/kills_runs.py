"""SIGKILL at random instants, and whether the runs end as if nothing had happened.

    python scripts/kills_runs.py [kills, 100 by default] [seed, 0]

Tiny jobs with a checkpoint after every step (LoRA; QLoRA with 8-bit state; full): each is run once to its end, and then
again and again in new folders, killed up to four times at random instants from its first second to its last, and gone
on with by the same command. Each ends with weight files that are byte-identical to those of the run that was left in
peace, and with every step once in metrics.jsonl. Exit code 1 where one does not. tests/tasks/test_kills.py does a few.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.forked import Forks  # noqa: E402
from tests.jobs import overrides, tiny_base, write_rows  # noqa: E402

STEPS = 8
CASES = {
    "lora": ("method=lora", "rank=4", "dropout=0.1"),
    "qlora, 8-bit state": ("method=qlora", "rank=8", "optim=paged_adamw_8bit"),
    "full": ("method=full", "optim=adamw"),
}
_MOST = 4  # kills of one run


def words(folder: Path, case: str) -> list[str]:
    """The command line of a case, but for `out`."""
    more = (*CASES[case], "lr=1e-2", f"steps={STEPS}", "save_every=1", "eval.every=3", "eval.max_new_tokens=0")
    rows = folder / "rows.jsonl"
    return overrides(tiny_base(folder / "llama"), rows if rows.exists() else write_rows(rows), *more)


def weights(run: Path) -> dict[str, str]:
    """Every file of weights that a run hands over, by its SHA-256."""
    files = [p for made in ("adapter", "model") for p in sorted((run / made).glob("*.safetensors"))]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def steps(run: Path) -> list[int]:
    """The steps in metrics.jsonl, as they stand there."""
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


class Case:
    """A job, and how it ends where nobody kills it."""

    def __init__(self, forks: Forks, folder: Path, name: str) -> None:
        self.forks, self.folder, self.name, self.words = forks, folder, name, words(folder, name)
        self._run("warm")  # what is cached for later runs is not a run's own time
        self.seconds = self._run("whole").seconds
        self.expected = weights(folder / "whole")
        assert self.expected, "nothing was handed over"

    def _run(self, out: str):  # type: ignore[no-untyped-def]
        ended = self.forks.run(*self.words, f"out={self.folder / out}")
        assert ended.code == 0, ended.said
        return ended

    def killed(self, number: int, dice: random.Random, most: int = _MOST) -> tuple[int, list[str]]:
        """(how often a run in a new folder was killed before it ended, what is wrong with its end)."""
        run, kills = self.folder / f"run-{number}", 0
        while kills < most:
            # from the first import of the job's own to a little beyond the end, which then comes first
            ended = self.forks.run(*self.words, f"out={run}", kill=dice.uniform(0.05, 1.05) * self.seconds)
            if ended.code != -9:
                break
            kills += 1
        else:
            ended = self.forks.run(*self.words, f"out={run}")
        wrong = [] if ended.code == 0 else [f"exit code {ended.code}: {ended.said.strip().splitlines()[-1:]}"]
        if not wrong:
            wrong += [] if weights(run) == self.expected else ["other weights"]
            wrong += [] if steps(run) == list(range(1, STEPS + 1)) else [f"metrics.jsonl has steps {steps(run)}"]
            left = [p.name for p in (*run.iterdir(), *(run / "checkpoints").iterdir()) if p.name.endswith(".tmp")]
            wrong += [f"left behind: {left}"] if left else []
        return kills, wrong


def main(arguments: list[str]) -> int:
    asked, seed = (int(x) for x in (arguments + ["100", "0"][len(arguments) :])[:2])
    dice, done, bad, started = random.Random(seed), 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as made, Forks() as forks:
        cases = [Case(forks, _folder(Path(made), name), name) for name in CASES]
        number = 0
        while done < asked:
            case = cases[number % len(cases)]
            kills, wrong = case.killed(number, dice)
            number, done, bad = number + 1, done + kills, bad + bool(wrong)
            print(
                f"{case.name}: killed {kills} times: {'; '.join(wrong) or 'the same weights, every step once'}",
                flush=True,
            )
    print(f"{done} kills of {number} runs in {time.monotonic() - started:.0f} s; {bad} runs ended otherwise")
    return 1 if bad else 0


def _folder(made: Path, name: str) -> Path:
    folder = made / name.split(",")[0]
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
