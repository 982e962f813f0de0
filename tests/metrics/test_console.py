"""The console on a terminal, in a pipe, and in log.txt."""

from __future__ import annotations

import errno
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ftrun.metrics.console import Console
from ftrun.metrics.wording import clock, curve, job_rows, size
from tests.metrics.records import JOB, RESULT, evaluation, step

STEPS = 60


def drive(console: Console, run: Path) -> None:
    console.say("reading the data")
    console.start(JOB, run)
    console.total = STEPS
    console.evaluation(evaluation(0, loss=3.1))
    for number in range(1, STEPS + 1):
        console.step(step(number, loss=3.0 - number / STEPS))
    console.close(RESULT)


def test_in_a_pipe_there_are_plain_lines_and_log_txt_has_the_same(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    out = io.StringIO()
    drive(Console(file=out), tmp_path)
    text = out.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    assert (tmp_path / "log.txt").read_text() == text
    shown = [int(n) for n in re.findall(r"^step +(\d+)/60 ", text, re.MULTILINE)]
    assert shown == [1, *range(3, STEPS + 1, 3)]
    for part in ("reading the data", "qlora  rank=16", "loss 2.0000", "812 tokens/s", "mem 1.00 GB (peak 1.40 GB)"):
        assert part in text
    assert "held-out loss 3.100 → 2.100, perplexity 22.200 → 8.170" in text
    assert "retention: the base's own text 2.81 → 2.95 (+0.14)" in text
    assert "a generated token: base 9.8 ms, tuned 12.1 ms\n" in text
    assert "after   A central processing unit." in text
    assert f"adapter: {tmp_path / 'adapter'}" in text


def test_a_line_every_so_many_steps(tmp_path: Path) -> None:
    out = io.StringIO()
    drive(Console(file=out, every=25), tmp_path)
    assert re.findall(r"^step +(\d+)", out.getvalue(), re.MULTILINE) == ["1", "25", "50", "60"]


class Screen(io.StringIO):
    """Looks like a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [30, 80, 160])
def test_on_a_terminal_the_line_fits(tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    terminal = Screen()
    console = Console(file=terminal)
    console.start(JOB, tmp_path)
    console.total = STEPS
    console.step(step(1))
    console.say("a line above")
    console.step(step(STEPS))
    console.close(RESULT)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    drawn = [line for line in re.split(r"[\r\n]+", text) if f"{STEPS}/{STEPS}" in line]
    assert drawn
    assert all(len(line) <= width for line in drawn)
    assert ("eta" in drawn[0]) == (width >= 80)
    assert ("━" in drawn[0]) == (width >= 80)
    # log.txt has plain lines, the terminal the live one
    log = (tmp_path / "log.txt").read_text()
    assert "━" not in log
    assert "step 60/60  loss 2.0000" in log
    assert "step 60/60" not in text


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ftrun.metrics.console import Console\n"
        "from tests.metrics.test_console import drive\n"
        f"drive(Console(), Path({str(tmp_path)!r})); print('alive', file=sys.stderr)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert b"alive" in process.stderr.read()
    process.wait()
    assert "step 60/60" in (tmp_path / "log.txt").read_text()


def test_a_terminal_without_utf8_gets_question_marks(tmp_path: Path) -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    drive(Console(file=file), tmp_path)
    assert b"held-out loss 3.100 ? 2.100" in raw.getvalue()


def test_a_run_that_goes_on_appends_to_its_log(tmp_path: Path) -> None:
    for _ in range(2):
        drive(Console(file=io.StringIO()), tmp_path)
    assert (tmp_path / "log.txt").read_text().count("step 60/60") == 2


def test_a_failed_run_closes_without_a_summary(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(total=3, file=out)
    console.start(JOB, tmp_path)
    console.step(step(1))
    console.close(None)
    console.close(None)
    assert out.getvalue().splitlines()[-1].startswith("step 1/3")


def test_the_job_is_shown_once_and_without_nulls() -> None:
    assert job_rows(JOB) == [
        ("model", "smollm2-135m  source=package"),
        ("method", "qlora  rank=16  alpha=32  dropout=0"),
        ("log", "none"),
        ("run", "lr=0.0002  seed=0"),
    ]


def test_a_log_that_finds_no_room_waits_for_it_and_the_terminal_goes_on(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(total=2, file=out)
    console.start(JOB, tmp_path)
    assert console._log is not None
    disk, console._log._file = console._log._file, Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    console.say("one")
    console.say("two")
    console._log._file = disk
    console.close(None)
    assert out.getvalue().splitlines()[-3:] == [
        "warning: log.txt: cannot be written: No space left on device; its lines wait for room",
        "one",
        "two",
    ]
    assert (tmp_path / "log.txt").read_text().splitlines()[-2:] == ["one", "two"]


def test_a_log_that_cannot_be_written_ends_and_the_terminal_goes_on(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(total=2, file=out)
    console.start(JOB, tmp_path)
    assert console._log is not None
    console._log._file = Broken()  # type: ignore[assignment]
    console.say("one")
    console.say("two")
    console.close(None)
    assert out.getvalue().splitlines()[-3:] == [
        "warning: log.txt: cannot be written: Input/output error; it ends here",
        "one",
        "two",
    ]


class Broken(io.BytesIO):
    def write(self, data: object) -> int:
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"path": "/my/base", "source": "package"}, "/my/base  dtype=float32"),
        ({"path": "org/name", "source": "hub", "revision": "v2"}, "org/name  revision=v2  dtype=float32"),
        ({"source": "package"}, "smollm2-135m  source=package  package=p==1  license=mit  dtype=float32"),
        ({"source": "hub"}, "smollm2-135m  source=hub  hub=o/n  license=mit  dtype=float32"),
    ],
)
def test_the_base_is_called_by_what_is_really_used(options: dict[str, str], shown: str) -> None:
    known = {"hub": "o/n", "package": "p==1", "license": "mit", "dtype": "float32"}
    rows = job_rows({"choices": {"model": "smollm2-135m"}, "model": {**options, **known}})
    assert rows[0] == ("model", shown)


def test_the_curve() -> None:
    assert curve([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 80) == "loss 8.000 █▇▆▅▄▃▂▁ 1.000"
    assert len(curve([float(n) for n in range(1000)], 40)) <= 40
    assert curve([1.0, float("nan"), 1.0], 80) == "loss 1.000 ▁▁ 1.000"
    assert curve([1.0], 80) == ""


def test_sizes_and_times_in_words() -> None:
    assert [size(n) for n in (12, 1.5e3, 2e6, 1_234_000_000, 2e12)] == [
        "12 B",
        "1.50 kB",
        "2.00 MB",
        "1.23 GB",
        "2.00 TB",
    ]
    assert [clock(s) for s in (4.25, 59.94, 185, 3723)] == ["4.2 s", "59.9 s", "3:05", "1:02:03"]
