"""metrics.jsonl and evals.jsonl: each step once, whatever happened before."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ftrun.metrics.jsonl import JsonLines, read
from tests.metrics.records import evaluation, step

CONTRACT = [
    "step",
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "supervised_tokens",
    "tokens_per_s",
    "mem_allocated",
    "mem_peak",
    "seconds",
]


def write(run: Path, after: int | None, steps: range, close: bool = True) -> JsonLines:
    sink = JsonLines(after)
    sink.start({}, run)
    for number in steps:
        sink.step(step(number, loss=float(number)))
    if close:
        sink.close({})
    return sink


def test_a_line_for_each_step_and_evaluation(tmp_path: Path) -> None:
    sink = write(tmp_path, None, range(1, 4), close=False)
    sink.evaluation(evaluation(3, best=True, extra={"exact_match": 0.5}))
    # flushed: the file is whole before the sink is closed
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [CONTRACT] * 3
    assert read(tmp_path / "evals.jsonl") == [
        {"step": 3, "loss": 2.0, "perplexity": 7.4, "tokens": 300, "seconds": 2.0, "best": True, "exact_match": 0.5}
    ]
    sink.close(None)


def test_a_run_that_goes_on_has_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, None, range(1, 9))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # killed while writing
    write(tmp_path, 5, range(6, 11))
    rows = read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 10


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read(path) == [{"step": 1}]


def test_a_run_that_begins_begins_its_files(tmp_path: Path) -> None:
    write(tmp_path, None, range(1, 5))
    write(tmp_path, None, range(1, 3))
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2]
    write(tmp_path, 0, range(1, 2))
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1]


def test_what_json_has_no_number_for_is_null(tmp_path: Path) -> None:
    sink = JsonLines()
    sink.start({}, tmp_path)
    sink.step(step(1, loss=math.nan, grad_norm=math.inf))
    sink.close(None)
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: 1 / 0)
    assert row["loss"] is None
    assert row["grad_norm"] is None
