"""SIGINT and SIGTERM: in the loop they ask for a stop after the step at hand, elsewhere they end the program.

A step or an evaluation that would keep a stop waiting is left, so that a checkpoint is written before whoever asked
loses patience (torch's launcher, Slurm: 30 s).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]

GRACE = 10.0  # seconds that what is at hand may go on after a request to stop
# seconds within which a second SIGTERM is the first one: `timeout` and schedulers signal a process, then its group
SAME = 1.0


class Terminated(KeyboardInterrupt):
    """SIGTERM: what Ctrl-C does, asked for by another process."""


class Abandoned(KeyboardInterrupt):
    """A request to stop could not wait for what was at hand."""


class Requests:
    """Called, whether someone asked to stop."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._at, self._open = say, 0.0, False
        self._first: int | None = None  # the signal that asked

    def __call__(self) -> bool:
        return self._first is not None

    def overdue(self) -> bool:
        """Whether a request has waited for GRACE seconds."""
        return self._first is not None and time.monotonic() - self._at >= GRACE

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """A block that raises Abandoned, wherever it is, once a request has waited for GRACE seconds."""
        self._open = True
        try:
            if self._first is not None:
                self._set_timer()
            yield
        finally:
            self._open = False
            if self._first is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def ask(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals. Raises KeyboardInterrupt where the first request is to wait no longer."""
        if self._first is not None:
            if number == self._first == signal.SIGTERM and time.monotonic() - self._at < SAME:
                return
            raise KeyboardInterrupt
        self._first, self._at = number, time.monotonic()
        if self._open:
            self._set_timer()
        with contextlib.suppress(RuntimeError):  # the signal came while that very stream was being written to
            self._say(
                f"stopping after this step, or without it in {GRACE:.0f} s; a checkpoint will be saved "
                "(once more to stop at once)"
            )

    def _set_timer(self) -> None:
        signal.signal(signal.SIGALRM, self._late)
        # 0 would be no timer; once more each second, since what is raised in a destructor is lost
        signal.setitimer(signal.ITIMER_REAL, max(0.001, self._at + GRACE - time.monotonic()), 1.0)

    def _late(self, number: int, frame: FrameType | None) -> None:
        if self._open:
            raise Abandoned


def hides_interruption(error: BaseException) -> bool:
    """Whether an error came of an interruption: a library's own cleaning up may fail when it is cut short anywhere."""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return before is not None and (isinstance(before, KeyboardInterrupt) or hides_interruption(before))


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM raises Terminated, as Ctrl-C raises KeyboardInterrupt."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    with _handled(end, signal.SIGTERM), _none_dropped():
        yield


@contextmanager
def _none_dropped() -> Iterator[None]:
    """Within the block an interruption that comes in a destructor, where Python drops it, comes once more."""
    before, timers = sys.unraisablehook, []

    def dropped(found: Any) -> None:
        error = found.exc_value
        if not isinstance(error, KeyboardInterrupt):
            before(found)
        elif not isinstance(error, Abandoned):  # that has a timer of its own
            number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
            timers.append(threading.Timer(0.1, os.kill, (os.getpid(), number)))
            timers[-1].start()

    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


@contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[Requests]:
    """Within the block, what knows whether someone asked to stop; asking a second time stops at once."""
    asked = Requests(say)
    before = signal.getsignal(signal.SIGALRM)
    try:
        with _handled(asked.ask, signal.SIGINT, signal.SIGTERM):
            yield asked
    finally:
        if asked():  # else no timer was set
            signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


@contextmanager
def _handled(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Signals handled so within the block. Only the main thread is told of any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, handler) for n in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)
