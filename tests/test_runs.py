"""A run's folder: made, found, refused, left as it was; files and folders whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ftrun import runs
from ftrun.errors import UserError
from ftrun.runs import aside, cache_dir, check_run, open_run, read_json, steps_done, tidy, write_json

JOB = {"choices": {"method": "lora"}, "lr": 1.0, "steps": 3}


def fill(folder: Path, text: str) -> None:
    with aside(folder) as beside:
        beside.mkdir()
        (beside / "a").write_text(text)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(runs, "_exchange", lambda one, other: False)
    fill(tmp_path / "best", "old")
    fill(tmp_path / "best", "new")
    assert (tmp_path / "best/a").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_what_was_there_stays_where_the_new_one_fails(tmp_path: Path) -> None:
    fill(tmp_path / "best", "old")
    with pytest.raises(OSError, match="full"), aside(tmp_path / "best") as beside:  # noqa: PT012
        beside.mkdir()
        raise OSError("full")
    assert (tmp_path / "best/a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_leftovers_of_the_killed_go_and_what_they_moved_away_comes_back(tmp_path: Path) -> None:
    for name in (".step-6.123.tmp", ".best.123.old", ".step-4.9.old", "step-4"):
        (tmp_path / name).mkdir()
    (tmp_path / ".result.json.77.tmp").touch()
    (tmp_path / "metrics.jsonl.new").touch()
    (tmp_path / ".mine").touch()
    tidy(tmp_path)
    tidy(tmp_path / "nowhere")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine", "best", "step-4"]


def test_json_has_null_for_what_it_has_no_number_for(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"loss": float("nan"), "all": [float("inf"), 1.5]})
    assert read_json(tmp_path / "x.json") == {"loss": None, "all": [None, 1.5]}


def test_a_folder_that_the_user_made_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name, stays in (("mine", True), ("new/below", False)):
        run = open_run(tmp_path / name, JOB, "auto")
        assert run.fresh
        (run.path / "plan.json").touch()
        run.discard()
        run.release()
        assert run.path.exists() == stays
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_run_that_is_there_is_found_and_never_discarded(tmp_path: Path) -> None:
    open_run(tmp_path, JOB, "auto").release()
    run = open_run(tmp_path, JOB, "auto")
    assert not run.fresh
    run.discard()
    assert (tmp_path / "job.yaml").is_file()
    with pytest.raises(UserError, match="at work there"):
        check_run(tmp_path, JOB, "auto")
    run.release()
    with pytest.raises(UserError, match=r"(?s)lr: 1\.0 there, 2\.0 now"):
        open_run(tmp_path, {**JOB, "lr": 2.0}, "auto")
    # the refusal has let the folder go, and the job on record is still the first
    assert check_run(tmp_path, JOB, "auto") == JOB


def test_the_record_is_made_late_and_ends_an_earlier_result(tmp_path: Path) -> None:
    open_run(tmp_path, JOB, "auto").release()
    write_json(tmp_path / "result.json", {"status": "finished", "steps": 3})
    (tmp_path / "checkpoints/step-2").mkdir(parents=True)
    assert steps_done(tmp_path) == 3
    run = open_run(tmp_path, {**JOB, "steps": 9}, "auto")
    assert run.result()
    run.record({**JOB, "steps": 9}, ["base sha256 abc"])
    assert run.result() is None
    assert "# base sha256 abc\n" in (tmp_path / "job.yaml").read_text()
    assert steps_done(tmp_path) == 2
    run.release()


def test_json_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(UserError, match=r"x\.json: damaged: expected a JSON object, found list"):
        read_json(tmp_path / "x.json")


def test_a_killed_start_is_no_stranger(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".job.yaml.12.tmp").touch()
    assert check_run(tmp_path, JOB, "auto") is None
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty"):
        check_run(tmp_path, JOB, "auto")


def test_folders_that_cannot_be_used_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for bad in (tmp_path / ("x" * 300), tmp_path / "file/below", tmp_path / "file"):
        with pytest.raises(UserError, match="out=") as refusal:
            check_run(bad, JOB, "auto")
        assert len(str(refusal.value)) < 400
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"out={tmp_path}/a/b: {tmp_path} cannot be written"):
        check_run(tmp_path / "a/b", JOB, "auto")


def test_a_user_without_a_home_is_told_of_ftrun_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FTRUN_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", _homeless)
    with pytest.raises(UserError, match="set FTRUN_CACHE=DIR"):
        cache_dir()


def _homeless(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")
