"""One rank of a run that is cut and gone on with: `python -m tests.ranks.again FOLDER OVERRIDES…`, by ftrun's launcher.

FOLDER/whole is the run; FOLDER/cut is what was there of it after its second step, gone on with to the end.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from ftrun.compose import compose
from ftrun.tasks.desk import Caller, Desk
from ftrun.tasks.rank import work
from ftrun.train.ranks import end, join


def main(folder: Path, overrides: list[str]) -> None:
    """Both runs, one after the other, in the same processes."""
    for name in ("whole", "cut"):
        out = folder / name
        job = compose([*overrides, f"out={out}"])
        if name == "cut" and os.environ["RANK"] == "0":
            later = shutil.ignore_patterns("step-4", "result.json", "adapter")
            shutil.copytree(folder / "whole", out, ignore=later)
        with Desk(job) as desk:  # of this rank's own
            work(out, Caller(desk.name))
        join("cpu").wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    end(0)
