"""metrics.jsonl and evals.jsonl: each step once, whatever happened before."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest

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


def test_lines_that_were_lost_are_taken_from_the_checkpoint(tmp_path: Path) -> None:
    sink = write(tmp_path, None, range(1, 4), close=False)
    for number in (0, 2):
        sink.evaluation(evaluation(number))
    kept = sink.content()
    sink.evaluation(evaluation(3, extra={"answer": "x"}))  # later than the checkpoint
    sink.close(None)
    for name, content in kept.items():
        assert (tmp_path / name).read_bytes().startswith(content)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(lines[0].replace(b"1.0", b"9.0") + lines[1][:20])
    said: list[str] = []
    sink = JsonLines(3, say=said.append, kept=kept)
    sink.start({}, tmp_path)
    sink.close(None)
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept["metrics.jsonl"]
    assert [row["step"] for row in read(tmp_path / "evals.jsonl")] == [0, 2, 3]
    assert said == [f"warning: {tmp_path}/metrics.jsonl: 2 lines were lost; they are taken from the checkpoint"]


class Small:
    """A file on a disk with so much room."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken


def test_on_a_full_disk_lines_wait_for_room(tmp_path: Path) -> None:
    said: list[str] = []
    sink = JsonLines(say=said.append)
    sink.start({}, tmp_path)
    lines = sink._files["metrics.jsonl"]
    disk = lines._file = Small(lines._file, room=400)  # type: ignore[assignment]
    for number in (1, 2, 3):
        sink.step(step(number))
    assert len(said) == 1
    assert "metrics.jsonl: CANNOT BE WRITTEN: No space left on device" in said[0]
    assert sink.content()["metrics.jsonl"].count(b"\n") == 3  # a checkpoint's copy lacks none
    assert (tmp_path / "metrics.jsonl").stat().st_size == 400
    with pytest.raises(OSError, match="No space left") as short:
        sink.settle()
    assert short.value.filename == f"{tmp_path}/metrics.jsonl"
    disk.room = 10_000
    sink.step(step(4))
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert said[1:] == [f"{tmp_path}/metrics.jsonl: there is room again; no line is lost"]
