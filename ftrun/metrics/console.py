"""The terminal and log.txt. A live line on a terminal; elsewhere, and in log.txt, plain lines and nothing else."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ftrun.metrics import wording
from ftrun.metrics.lines import Lines
from ftrun.secrets import hide
from ftrun.values import EvalRecord, StepRecord

_LABEL = 8  # characters of a row's label in the job's table
_REDRAW = 0.1  # seconds between two drawings of the live line
_BAR = 16  # characters of the bar, at least
_RECENT = 20  # steps that the time left is judged by


class Console:
    """The sink that people read.

    total: the run's optimiser steps, where known; it may be set later (`console.total = 60`), before the first step.
    every: a plain line each so many steps; by default about 20 in a run, the first and the last among them.
    file: where to write, by default standard output. A reader that leaves does not end the run: log.txt goes on.
    """

    def __init__(self, total: int | None = None, every: int | None = None, file: TextIO | None = None) -> None:
        self.total = total
        self.every = every
        self._file = file or sys.stdout
        self._terminal = Terminal(file=self._file, highlight=False, markup=False, emoji=False, soft_wrap=True)
        utf8 = (getattr(self._file, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
        self._live_line = self._terminal.is_terminal and not self._terminal.is_dumb_terminal and utf8
        self._live: Live | None = None
        self._log: Lines | None = None
        self._ended = False  # whether there was a log.txt, and is no more
        self._early: list[str] = []  # said before there was a log.txt
        self._losses: list[float] = []
        self._seconds: list[float] = []
        self._drawn = 0.0
        self._run: Path | None = None
        self._shown = False

    def show(self, job: dict[str, Any]) -> None:
        """Show the composed job, before anything heavy is loaded; `start` shows it where nobody has."""
        self._shown = True
        for label, text in wording.job_rows(job):
            self._row(label, text)

    def start(self, job: dict[str, Any], run: Path) -> None:
        """Open log.txt (what was said before comes first in it)."""
        self._run = run
        self._log = Lines(run / "log.txt")
        for line in self._early:
            self._record(line)
        self._early.clear()
        if not self._shown:
            self.show(job)

    def draw(self, render: Callable[[Terminal], None]) -> None:
        """A table of others', once the run has ended."""
        width = None if self._terminal.is_terminal else 120
        render(Terminal(file=self._file, width=width, highlight=False))

    def step(self, record: StepRecord) -> None:
        self._losses.append(record.loss)
        self._seconds.append(record.seconds)
        eta = self._eta(record.step)
        if self._due(record.step):
            line = wording.step(record, self.total, eta)
            self._record(line)
            if not self._live_line:
                self._write(line)
        if self._live_line:
            self._draw(record.step, wording.live_parts(record, self.total, eta))

    def evaluation(self, record: EvalRecord) -> None:
        self.say(wording.evaluation(record))

    def say(self, text: str) -> None:
        """A line, or several, above the live one."""
        for line in hide(text).splitlines():
            self._record(line)
            self._write(line)

    def close(self, result: dict[str, Any] | None) -> None:
        """End the live line; show the curve and, from the result, what the run did. A second call does nothing more."""
        if self._live is not None:
            self._guard(self._live.stop)
            self._live = None
        if result is not None:
            self._summary(result)
        self._end_log()

    def _end_log(self) -> None:
        if self._log is not None:
            self._log.close()
        self._log, self._ended = None, True

    def _summary(self, result: dict[str, Any]) -> None:
        curve = wording.curve(self._losses, self._width())
        status, *rest = wording.closing(result)
        for line in filter(None, [status, curve, *rest]):
            self.say(line)
        for row in result.get("samples") or []:
            for line in wording.sample(row):
                self.say(line)
        for made in ("adapter", "model"):
            if self._run is not None and (self._run / made).is_dir():
                self.say(f"{made}: {self._run / made}")

    def _row(self, label: str, text: str) -> None:
        """A row of the job's table, folded to the terminal, the label standing out where there is colour."""
        lines = textwrap.wrap(text, max(20, self._width() - _LABEL), break_on_hyphens=False) or [""]
        for head, line in zip([label, *[""] * len(lines)], lines, strict=False):
            plain = f"{head:<{_LABEL}}{line}".rstrip()
            self._record(plain)
            self._write(plain, Text.assemble((f"{head:<{_LABEL}}", "bold"), line))

    def _draw(self, step: int, parts: list[str]) -> None:
        now = time.monotonic()
        if self._live is None:
            self._live = Live(console=self._terminal, auto_refresh=False, transient=True)
            self._guard(self._live.start)
        elif now - self._drawn < _REDRAW and step != self.total:
            return
        self._drawn = now
        width = self._width() - 2
        text = wording.fitting(parts, width - (_BAR if self.total and width > 3 * _BAR else 0))
        line = Table.grid(padding=(0, 1))
        if self.total and width - len(text) >= _BAR:
            bar = ProgressBar(total=self.total, completed=step, width=min(2 * _BAR, width - len(text)))
            line.add_row(bar, Text(text, no_wrap=True))
        else:
            line.add_row(Text(text, no_wrap=True))
        live = self._live
        self._guard(lambda: live.update(line, refresh=True))

    def _due(self, step: int) -> bool:
        every = self.every or max(1, (self.total or 200) // 20)
        return step % every == 0 or step == self.total or len(self._losses) == 1

    def _eta(self, step: int) -> float | None:
        recent = self._seconds[-_RECENT:]
        return sum(recent) / len(recent) * (self.total - step) if self.total else None

    def _width(self) -> int:
        return self._terminal.width if self._live_line else 120

    def _record(self, line: str) -> None:
        if self._log is None:
            if not self._ended:
                self._early.append(line)
            return
        before = self._log.trouble
        try:
            self._log.add(line)
        except OSError as error:
            self._end_log()
            self._write(f"warning: log.txt: cannot be written: {error.strerror}; it ends here")
            return
        if self._log.trouble is not None and before is None:
            self._write(f"warning: log.txt: cannot be written: {self._log.trouble.strerror}; its lines wait for room")

    def _write(self, line: str, styled: Text | None = None) -> None:
        if self._live_line:
            self._guard(lambda: self._terminal.print(styled or Text(line)))
            return
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        self._guard(lambda: print(line.encode(encoding, "replace").decode(encoding), file=self._file, flush=True))

    def _guard(self, show: Any) -> None:
        """Show; where the reader has left (a closed pipe, a lost terminal), show nothing from then on."""
        try:
            show()
        except OSError:
            self._live, self._live_line = None, False
            self._file = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it stays open for the rest of the run)
            self._terminal = Terminal(file=self._file)
