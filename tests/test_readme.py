"""What the README shows is what is printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_plan_is_the_one_that_is_printed() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, after = text.partition("    $ ftrun plan ")
    words, *shown = after.partition("\n`figure=")[0].splitlines()
    done = subprocess.run(
        [sys.executable, "-m", "ftrun", "plan", *words.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    printed = [line.rstrip() for line in (done.stderr + done.stdout).splitlines()]
    expected = [line.removeprefix("    ").rstrip() for line in shown if line.strip() not in ("", "…")]
    assert len(expected) > 40
    assert [line for line in expected if line not in printed] == []
