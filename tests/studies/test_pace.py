"""How long jobs take: by the device's rate at first, then by jobs of their size."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftrun.studies.pace import Pace


def plan(work: float, name: str = "a card") -> dict[str, object]:
    return {"work": work, "device": {"name": name, "rate": 1e12}}


def test_a_job_says_what_those_of_its_size_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path))
    pace = Pace()
    assert pace.seconds(plan(1e12)) is None  # no device is known yet
    pace.meet(plan(1e12))
    assert pace.seconds(plan(1e12)) == pytest.approx(5)  # at a fifth of the rate
    assert "rough" in pace.source([plan(1e12)])
    pace.note(plan(1e12), 10.0)
    pace.note(plan(1e6), 3.0)  # a tiny job is all start and end
    assert pace.seconds(plan(2e12)) == pytest.approx(20)
    assert pace.seconds(plan(1e15)) == pytest.approx(5000)
    assert pace.total([plan(1e12), plan(2e12)], width=2) == pytest.approx(15)
    assert pace.total([plan(1e12), {"work": None}]) is None

    again, elsewhere = Pace(), Pace()
    again.meet(plan(1e12))
    elsewhere.meet(plan(1e12, "another card"))
    assert again.seconds(plan(1e12)) == pytest.approx(10)
    assert elsewhere.seconds(plan(1e12)) == pytest.approx(5)


def test_a_damaged_file_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path))
    (tmp_path / "pace.json").write_text('{"a card": [1, "x"]}')
    pace = Pace()
    pace.meet(plan(1e12))
    assert pace.seconds(plan(1e12)) == pytest.approx(5)


def test_words() -> None:
    assert [Pace.words(s) for s in (40, 700, 12_600, None)] == ["40 s", "12 min", "3.5 h", "of unknown length"]
