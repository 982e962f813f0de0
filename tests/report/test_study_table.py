"""A study's table: everything in the CSV, what differs on the terminal."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ftrun.report.study_table import render, write_csv
from tests.report.studies import ended, grid_study, many, rank_study, row, study


def written(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    write_csv(path, rows)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def printed(rows: list[dict[str, Any]], width: int = 160, **more: Any) -> list[str]:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    render(rows, console, **more)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_the_csv_has_every_value_and_figure(tmp_path: Path) -> None:
    rows = grid_study()
    found = written(tmp_path / "table.csv", rows)
    assert len(found) == 18
    for line, one in zip(found, rows, strict=True):
        assert {key: line[key] for key in one["values"]} == one["values"]
        assert {key: float(line[key]) for key in one["figures"]} == one["figures"]  # to the last digit
        assert (int(line["number"]), line["out"]) == (one["number"], one["out"])
    assert (found[11]["status"], found[11]["reason"]) == ("does_not_fit", rows[11]["reason"])
    assert found[11]["loss"] == ""


def test_the_csv_takes_any_text_and_number(tmp_path: Path) -> None:
    rows = [row(1, {"layers": "[0,1]", "targets": 're:"a|b"'}), ended(2, {"layers": "é\ud800"}, "failed", 'a, "b"\nc')]
    rows[0]["figures"] = {"loss": math.nan, "tokens_per_s": math.inf, "merges": True, "odd": 1.5}
    first, second = written(tmp_path / "table.csv", rows)
    assert (first["layers"], first["targets"]) == ("[0,1]", 're:"a|b"')
    assert (first["loss"], first["tokens_per_s"], first["merges"], first["odd"]) == ("nan", "inf", "true", "1.5")
    assert (second["reason"], second["targets"]) == ('a, "b"\nc', "")


def test_a_swept_key_that_a_figure_is_called_after_keeps_its_column(tmp_path: Path) -> None:
    rows = study(steps=["50", "100"], status=["x"])
    first, _ = written(tmp_path / "table.csv", rows)
    assert (first["steps"], first["result.steps"]) == ("50", "120")
    assert (first["status"], first["values.status"]) == ("finished", "x")


def test_the_csv_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    path = tmp_path / "table.csv"
    write_csv(path, rank_study())
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="no text"):
        write_csv(path, [*rank_study(), row(8, {"rank": "8"}, figures={"loss": Broken()})])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_the_terminal_shows_what_differs_best_first() -> None:
    rows = grid_study()
    for one in rows:
        one["values"]["optim"] = "adamw"
    lines = printed(rows)
    head = next(line for line in lines if "held-out loss" in line)
    for name in ("method", "layers", "rank", "peak memory", "tokens/s"):
        assert name in head
    assert "optim" not in head
    assert "all parameters" not in head  # the same in all
    assert "the same in all: optim=adamw" in lines
    shown = [line.split() for line in lines if line.strip() and line.split()[0].isdigit()]
    done = sorted((one for one in rows if one["figures"]), key=lambda one: one["figures"]["loss"])
    assert [int(cells[0]) for cells in shown] == [*(one["number"] for one in done), 12]
    assert [cells[4] for cells in shown[:-1]] == [f"{one['figures']['loss']:.4f}" for one in done]
    assert [cells[-1] == "best" for cells in shown] == [True, *[False] * 17]
    assert [len(cells) for cells in shown] == [len(shown[0]), *[len(shown[0]) - 1] * 16, 7]


def test_a_run_that_came_to_nothing_says_why() -> None:
    rows = grid_study()
    for number in (1, 2):
        rows[number] = ended(number + 1, rows[number]["values"], "failed", "lost")
    lines = printed(rows, width=220)
    assert "run 12 does not fit: needs 1.21 GB, and the device has 1.00 GB to plan for" in lines
    assert "runs 2, 3 failed: lost" in lines
    (line,) = [line for line in lines if line.split()[:1] == ["12"]]
    assert line.rstrip().endswith("does not fit")


def test_the_terminal_takes_users_text_as_text() -> None:
    rows = [*study(layers=["[0,1]", "[bold]"]), ended(3, {"layers": "[/x]"}, "failed", "[red]no[/red]\x1b[2J")]
    text = "\n".join(printed(rows))
    for words in ("[0,1]", "[bold]", "[/x]", "[red]no[/red]"):
        assert words in text
    assert "\x1b" not in text


def test_a_narrow_terminal_names_what_it_leaves_out() -> None:
    lines = printed(grid_study(), width=90)
    assert max(map(len, lines)) <= 90
    assert any("held-out loss" in line for line in lines)
    (left,) = [line for line in lines if line.startswith("no room for: ")]
    assert "perplexity" in left
    assert not any("no room" in line for line in printed(grid_study(), width=300))


def test_another_objective_leads() -> None:
    lines = printed(grid_study(), objective="tokens_per_s")
    head = next(line for line in lines if "held-out loss" in line)
    assert head.index("tokens/s") < head.index("held-out loss")
    best = next(line for line in lines if line.rstrip().endswith("best"))
    fastest = max(one["figures"].get("tokens_per_s", 0) for one in grid_study())
    assert f" {fastest:,.0f} " in best


def test_without_a_held_out_loss_the_training_loss_leads() -> None:
    rows = [{**one, "figures": {k: v for k, v in one["figures"].items() if k != "loss"}} for one in grid_study()]
    for one in rows:
        one["figures"]["train_loss"] = 2.0 + 0.1 * one["number"]
    head = next(line for line in printed(rows, width=90) if "last training loss" in line)
    assert not head.startswith("no room for: ")
    assert head.index("last training loss") < head.index("peak memory")


@pytest.mark.parametrize(
    "rows",
    [[], [row(1, {})], [{}], [{"number": 1, "values": None, "status": "odd", "figures": None}], many()],
    ids=["none", "no values", "empty", "nulls", "many"],
)
def test_odd_studies_are_tables_all_the_same(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    lines = printed(rows)
    assert len(lines) > len(rows) if rows else lines == ["no runs"]
    assert len(written(tmp_path / "table.csv", rows)) == len(rows)
