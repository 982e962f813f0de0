"""`ftrun report DIR...`: real runs in one table and page, what their jobs differ in, and what it says of mistakes."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from ftrun.cli import main
from ftrun.compose import compose
from ftrun.runs import read_json
from ftrun.studies.ledger import Ledger
from tests.jobs import overrides, tiny_base, write_rows

SHORT = ("steps=2", "eval.max_new_tokens=0", "eval.retention=0", "save_every=null", "micro_batch=4")
RUNS = {
    "small": ("rank=2",),
    "large": ("rank=4",),
    "again": ("rank=4", "seed=1"),
    "wild": ("rank=4", "lr=1e30", "seed=2"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs, one of which fails; and one that was killed."""
    folder = tmp_path_factory.mktemp("report")
    base, rows = tiny_base(folder / "llama"), write_rows(folder / "rows.jsonl")
    for name, own in RUNS.items():
        assert main(overrides(base, rows, *SHORT, *own, f"out={folder / name}")) == (4 if name == "wild" else 0)
    shutil.copytree(folder / "small", folder / "killed")
    (folder / "killed" / "result.json").unlink()
    return folder


def found(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["report", *words, "format=json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return json.loads(said.out)


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["report", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_what_the_jobs_differ_in_are_the_axes(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("small", "large", "again")
    made = found(capsys, *(str(runs / name) for name in names))
    by_name = {Path(row["out"]).name: row for row in made["rows"]}
    assert {name: row["values"] for name, row in by_name.items()} == {
        "small": {"rank": "2", "seed": "0"},
        "large": {"rank": "4", "seed": "0"},
        "again": {"rank": "4", "seed": "1"},
    }
    for name, row in by_name.items():
        result = read_json(runs / name / "result.json") or {}
        assert row["figures"]["loss"] == result["eval"]["after"]["loss"]
        assert row["figures"]["peak_bytes"] == result["memory"]["measured_peak_bytes"]
        assert row["status"] == "finished"
    losses = [row["figures"]["loss"] for row in made["rows"]]
    assert losses == sorted(losses)
    assert (made["page"], made["table"]) == ("report.html", "table.csv")
    with open("table.csv", encoding="utf-8", newline="") as file:
        assert [line["rank"] for line in csv.DictReader(file)] == ["2", "4", "4"]
    page = Path("report.html").read_text(encoding="utf-8")
    mean = (by_name["large"]["figures"]["loss"] + by_name["again"]["figures"]["loss"]) / 2
    assert f"{mean:.4f} ± " in page, "two seeds of one setting are one line"
    assert "Planned and measured peak memory" in page


def test_links_lead_to_files_and_the_command_repeats_the_job(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pages" / "odd name.html"
    made = found(capsys, str(runs / "small"), str(runs / "large"), f"out={page}")
    links = [unescape(link) for link in re.findall(r'<a href="([^"#]+)"', page.read_text(encoding="utf-8"))]
    assert len(links) == 2 * 7
    assert {Path(link).name for link in links} >= {"job.yaml", "result.json", "log.txt", "metrics.jsonl", "adapter"}
    assert all((page.parent / link).exists() for link in links)
    for row in made["rows"]:
        program, *words = shlex.split(row["command"])
        assert program == "ftrun"
        again, there = compose(words).as_dict(), compose([f"job={row['out']}/job.yaml"]).as_dict()
        assert again.pop("out") != there.pop("out")
        assert again == there


def test_runs_that_came_to_nothing_are_rows_with_their_reason(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = found(capsys, *(str(runs / n) for n in ("small", "wild", "killed")), f"out={tmp_path / 'page.html'}")
    status = {Path(row["out"]).name: (row["status"], row["reason"]) for row in made["rows"]}
    assert status["small"] == ("finished", None)
    assert status["wild"][0] == "failed"
    assert "not finite" in status["wild"][1]
    assert status["killed"] == ("interrupted", "no result.json: it was ended from outside, saved after step 2")
    assert made["summary"][0] == "1 of 3 done, 1 failed, 1 interrupted."


def test_another_figure_ranks_them(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [str(runs / name) for name in ("small", "large", "again")]
    made = found(capsys, *places, "by=tokens_per_s", f"out={tmp_path / 'page.html'}")
    speeds = [row["figures"]["tokens_per_s"] for row in made["rows"]]
    assert speeds == sorted(speeds, reverse=True)
    assert "Did you mean 'peak_bytes'" in mistake(capsys, *places, "by=peak_byte")


def test_a_study_is_told_from_its_record(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A study that was killed in its third job: its own page's rows, the third of them interrupted."""
    study = tmp_path / "study"
    (study / "runs").mkdir(parents=True)
    (study / "study.yaml").write_text("fixed: ['data.held_out=4']\n", encoding="utf-8")
    ledger = Ledger(study / "ledger.jsonl")
    for number, name in enumerate(("small", "large", "killed")):
        shutil.copytree(runs / name, study / "runs" / name)
        fields = {"number": number, "key": name, "until": None, "kind": "train"}
        ledger.add("trial", row=number + 1, values={"rank": str(2 + number)}, note="chosen", folder=name, **fields)
        ledger.add("begin", number=number, key=name)
        if name != "killed":
            ledger.add("end", status="finished", reason=None, figures={"loss": 2.0 + number}, **fields)
    ledger.add("trial", number=3, key="bad", values={"rank": "x y"}, folder=None, until=None, kind="train", note="")
    ledger.add("end", number=3, key="bad", status="invalid", reason="rank=x y", until=None, kind="train", figures={})
    ledger.close()
    made = found(capsys, str(study))
    assert [row["status"] for row in made["rows"]] == ["finished", "finished", "interrupted", "invalid"]
    assert made["rows"][3]["command"] == "ftrun data.held_out=4 'rank=x y'"
    page = (study / "report.html").read_text(encoding="utf-8")
    assert 'href="runs/small/adapter/"' in page
    assert page.count("chosen") == 6  # in the table, and with each run
    with (study / "table.csv").open(encoding="utf-8", newline="") as file:
        assert [line["note"] for line in csv.DictReader(file)] == ["chosen"] * 3 + [""]

    both = found(capsys, str(study), str(runs / "again"), f"out={tmp_path / 'both.html'}")
    assert sorted(row["number"] for row in both["rows"]) == [1, 2, 3, 4, 5]
    again = next(row for row in both["rows"] if Path(row["out"] or "").name == "again")
    assert again["values"] == {"rank": "4", "seed": "1"}


def test_mistakes(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "which folders?" in mistake(capsys)
    assert f"Did you mean '{runs / 'small'}'" in mistake(capsys, str(runs / "smal"))
    said = mistake(capsys, str(runs))
    assert "neither job.yaml nor study.yaml" in said
    assert "It holds 5, as again" in said
    assert "Did you mean 'format'" in mistake(capsys, str(runs / "small"), "fromat=json")
    assert "expected a file of HTML" in mistake(capsys, str(runs / "small"), f"out={tmp_path / 'page.pdf'}")
    assert "-m: ftrun report" in mistake(capsys, "-m", str(runs / "small")).replace("--multirun", "-m")
    for text in ("{", "[]", '{"status": "done"}', '{"status": "finished", "eval": 3}'):
        damaged = tmp_path / "damaged"
        shutil.copytree(runs / "small", damaged, dirs_exist_ok=True)
        (damaged / "result.json").write_text(text, encoding="utf-8")
        assert f"{damaged / 'result.json'}: " in mistake(capsys, str(damaged))
    (damaged / "job.yaml").write_text("[", encoding="utf-8")
    shutil.copy(runs / "small" / "result.json", damaged)
    assert f"{damaged / 'job.yaml'}: not readable" in mistake(capsys, str(damaged))
    assert not (damaged / "report.html").exists()
    if os.getuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "cannot be written" in mistake(capsys, str(runs / "small"), f"out={tmp_path / 'closed' / 'page.html'}")
