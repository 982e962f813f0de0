"""SIGTERM is SIGINT by another name, from the start to the end."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from ftrun import cli
from ftrun.errors import UserError
from ftrun.train import interrupt
from ftrun.train.interrupt import Abandoned, Terminated, stop_requests, terminable


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_termination_is_an_interruption_within_the_block() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), terminable():
        send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_first_request_waits_for_the_step_and_the_second_does_not(
    second: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "SAME", 0.0)
    said: list[str] = []
    with terminable(), stop_requests(said.append) as asked:
        assert not asked()
        send(signal.SIGTERM)
        assert asked()
        assert len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            send(second)
    with terminable(), pytest.raises(Terminated):
        send(signal.SIGTERM)


def test_an_interruption_in_a_destructor_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    class Last:
        def __del__(self) -> None:
            send(signal.SIGTERM)

    before = sys.unraisablehook
    with pytest.raises(Terminated), terminable():  # noqa: PT012
        Last()
        time.sleep(10)
    assert sys.unraisablehook == before
    assert capfd.readouterr().err == ""


def test_a_cleanup_that_an_interruption_broke_is_no_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Hydra's does, in the midst of composing."""

    def dispatch(given: list[str]) -> int:
        try:
            try:
                send(signal.SIGTERM)
            finally:
                None.cleared()  # type: ignore[attr-defined]
        except AttributeError as error:
            if "wrapped" in given:
                raise UserError(str(error)) from error
            raise
        return 0

    monkeypatch.setattr(cli, "_dispatch", dispatch)
    for given in ([], ["wrapped"]):
        assert cli.main(given) == 130
        assert capsys.readouterr().err == "ftrun: interrupted\n"


def test_a_process_and_its_group_signalled_at_once_are_one_request() -> None:
    """As `timeout` does it."""
    with stop_requests(lambda text: None) as asked:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_what_keeps_a_request_waiting_is_left_where_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "GRACE", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    with stop_requests(lambda text: None) as asked:
        with pytest.raises(Abandoned), asked.abandonable():  # noqa: PT012 (asked for within)
            send(signal.SIGTERM)
            time.sleep(30)
        time.sleep(0.3)  # what is not so is never left
        assert asked.overdue()
        with pytest.raises(Abandoned), asked.abandonable():
            time.sleep(30)
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with stop_requests(lambda text: None) as asked, asked.abandonable():
        time.sleep(0.3)  # nobody asked
