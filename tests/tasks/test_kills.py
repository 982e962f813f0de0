"""Kills at random instants, a few of what scripts/kills_runs.py does by the hundred."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

from tests.forked import ROOT, Forks

_SPEC = importlib.util.spec_from_file_location("kills_runs", ROOT / "scripts" / "kills_runs.py")
assert _SPEC is not None
assert _SPEC.loader is not None
kills_runs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(kills_runs)


def test_five_kills_change_nothing(tmp_path: Path) -> None:
    dice, kills = random.Random(1), 0
    with Forks() as forks:
        case = kills_runs.Case(forks, tmp_path, "qlora, 8-bit state")
        for number in range(20):
            found, wrong = case.killed(number, dice, most=min(3, 5 - kills))
            assert wrong == []
            kills += found
            if kills == 5:
                break
    assert kills == 5
