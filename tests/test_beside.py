"""What killed processes leave is taken away; what living ones write stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ftrun.beside import QUIET, replace_text, sweep

GONE = 2**22 + 1  # beyond the largest process id of Linux


def test_leftovers_of_processes_that_are_gone_go(tmp_path: Path) -> None:
    old = time.time() - QUIET - 1
    left = [f"quantised/.abc.{GONE}", f"data/.abc.{GONE}-ab12cd_9", "data/.abc-ab12cd_9", f"evals/.a.json.{GONE}.tmp"]
    kept = ["models/.smollm2-135m.lock", f"data/.abc.{os.getpid()}", "data/abc-ab12cd_9", f"quantised/.new.{GONE}"]
    for name in left + kept:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "part").write_text("x")
        if "new" not in name:
            os.utime(folder / "part", (old, old))
            os.utime(folder, (old, old))
    sweep(tmp_path)
    assert [name for name in left + kept if (tmp_path / name).exists()] == kept


def test_a_text_is_whole_or_absent(tmp_path: Path) -> None:
    replace_text(tmp_path / "notes" / "a", "one")
    assert (tmp_path / "notes" / "a").read_text() == "one"
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError, match="b"):
        replace_text(tmp_path / "b", "two")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "notes"]
