"""One of two ranks, of which the second runs out of memory: `python -m tests.ranks.lost`, by ftrun's launcher."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ftrun.errors import RunFailed
from ftrun.tasks import rank
from ftrun.train.ranks import end, join


def work(run: Path, job: Any) -> None:
    """The first rank waits for the second, which ends early in a second of the clock: both ends fall into one."""
    ranks = join("cpu")
    ranks.wait()
    if ranks.rank == 1:
        time.sleep(1 - time.time() % 1)
        raise RunFailed("out of memory in step 3")
    ranks.wait()


if __name__ == "__main__":
    rank.work, rank.frozen = work, lambda path: None  # type: ignore[assignment,return-value]
    end(rank.main(Path(), Path()))
