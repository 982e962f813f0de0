"""`ftrun plan`: what it prints, its exit codes, and what it says of mistakes."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from ftrun.cli import main
from tests.jobs import overrides, tiny_base, write_rows


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("plan")
    base = tiny_base(folder / "llama", "llama", num_hidden_layers=7)
    return overrides(base, write_rows(folder / "rows.jsonl"), "method=lora", "rank=4")


def planned(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, dict]:
    capsys.readouterr()
    code = main(["plan", *line, "format=json"])
    return code, json.loads(capsys.readouterr().out)


def test_it_prints_one_json_object(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, found = planned(capsys, *line)
    assert code == 0
    assert found["fits"]
    assert sum(found["at_peak"].values()) == found["peak_bytes"]
    assert found["lengths_from"] == "data"
    assert max(found["lengths"]) < 128  # the rows', not seq_len
    assert found["modules"][0]["rank"] == 4
    assert sum(m["parameters"] for m in found["modules"]) == found["trainable_params"]
    assert [c["fits"] for c in found["cards"]] == [True] * len(found["cards"])
    assert found["savings"] == sorted(found["savings"], key=lambda s: -s["saved_bytes"])
    assert 1 <= len(found["savings"]) <= 3


@pytest.mark.slow
def test_a_saving_is_what_the_plan_of_the_change_says(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _, found = planned(capsys, *line, "micro_batch=4", "checkpointing=none")
    for saving in found["savings"]:
        key = saving["override"].partition("=")[0]
        kept = [w for w in (*line, "micro_batch=4", "checkpointing=none") if w.partition("=")[0] != key]
        if key != "seq_len":  # shorter rows are other rows: some are cut, others are not
            _, changed = planned(capsys, *kept, saving["override"])
            assert changed["needed_bytes"] == saving["needed_bytes"], saving
        assert saving["saved_bytes"] == found["needed_bytes"] - saving["needed_bytes"]


@pytest.mark.slow
def test_a_job_that_does_not_fit_prints_in_full_and_exits_with_3(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = planned(capsys, *line, "device.memory=600kB")
    assert code == 3
    assert not found["fits"]
    assert found["savings"]
    assert main(["plan", *line, "device.memory=600kB"]) == 3
    text = capsys.readouterr().out
    for words in ("weights", "at the peak", "does not fit", "memory through a step", "what saves most", "q_proj"):
        assert words in text


def test_rows_of_seq_len_where_no_tokenizer_is_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = planned(capsys, "model=llama-7b", "method=qlora", "rank=4", "seq_len=64", "device=24gb", "batch=2")
    assert code == 0
    assert found["lengths_from"] == "seq_len"
    assert set(found["lengths"]) == {64}
    assert found["on_top"]["CUDA's context"] > 0
    assert found["paging"]["of"] >= found["paging"]["tensors"] > 0


def test_the_figure_is_a_picture(line: list[str], tmp_path: Path) -> None:
    assert main(["plan", *line, f"figure={tmp_path / 'plan.svg'}"]) == 0
    root = ElementTree.parse(tmp_path / "plan.svg").getroot()
    assert root.tag.endswith("svg")
    assert len(root.findall(".//{*}polygon")) >= 4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("device.memory=-4GB", "device.memory"),
        ("device.memory=4XB", "expected a size as 24GB"),
        ("device.memory=0", "1 byte or more"),
        ("device=rtx4909", "Did you mean 'rtx4090'?"),
        ("device=a100", "Did you mean 'a100-40gb'?"),
        ("format=yaml", "expected one of text, json"),
        ("device.memmory=4GB", "Did you mean 'device.memory'?"),
    ],
)
def test_mistakes_are_answered(override: str, said: str, line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [w for w in line if w.partition("=")[0] != override.partition("=")[0]]
    assert main(["plan", *words, override]) == 2
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_a_job_that_does_not_fit_is_refused_before_anything_is_made(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line, f"out={tmp_path / 'run'}", "device.memory=600kB"]) == 3
    said = capsys.readouterr().err
    assert "at its peak" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_refusal_names_settings_that_fit(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = [*line, "micro_batch=4", "checkpointing=none"]
    _, found = planned(capsys, *fixed)
    room = f"device.memory={int(found['needed_bytes'] * 0.95 / 0.9)}"
    assert main([*fixed, f"out={tmp_path / 'run'}", room]) == 3
    said = capsys.readouterr().err
    assert "These settings fit" in said
    named = said.partition("GB: ")[2].partition(". refuse=false")[0].split()
    keys = {word.partition("=")[0] for word in named}
    kept = [w for w in fixed if w.partition("=")[0] not in (*keys, "eval.max_new_tokens")]
    assert main([*kept, *named, f"out={tmp_path / 'run'}", room, "steps=1", "eval=none"]) == 0
