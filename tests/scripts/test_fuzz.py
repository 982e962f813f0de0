"""Two hundred inputs of scripts/fuzz.py, over all its surfaces, and the same ones each time."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from ftrun.runs import cache_dir
from tests.forked import ROOT

_SPEC = importlib.util.spec_from_file_location("fuzz", ROOT / "scripts" / "fuzz.py")
assert _SPEC is not None
assert _SPEC.loader is not None
fuzz = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz)
COUNT = 200


@pytest.fixture(scope="module")
def fuzzing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fuzz.Fuzz(tmp_path_factory.mktemp("fuzz"), cache_dir())


@pytest.mark.parametrize("surface", fuzz.SHARES)
def test_each_input_ends_in_a_result_or_one_message(fuzzing: Any, surface: str) -> None:
    chosen = [number for number, one in enumerate(fuzz.sequence(COUNT)) if one == surface]
    assert chosen
    found = {number: fuzzing.one(surface, f"9 {number}") for number in chosen}
    assert {number: wrong for number, wrong in found.items() if wrong} == {}


def test_what_is_not_allowed_is_seen(fuzzing: Any, tmp_path: Path) -> None:
    def writes(dice: object) -> None:
        (tmp_path / "outside").write_text("x")

    def raises(dice: object) -> None:
        raise KeyError("x")

    for act, said in ((writes, "not allowed: "), (raises, "KeyError")):
        other = type("Other", (fuzz.Fuzz,), {"surfaces": {"x": act}})
        made = other.__new__(other)
        made.__dict__.update(fuzzing.__dict__)
        assert said in made.one("x", "0")
