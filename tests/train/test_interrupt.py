"""SIGTERM is SIGINT by another name, from the start to the end."""

from __future__ import annotations

import os
import signal

import pytest

from ftrun.train.interrupt import Terminated, stop_requests, terminable


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_termination_is_an_interruption_within_the_block() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), terminable():
        send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_first_request_waits_for_the_step_and_the_second_does_not(second: int) -> None:
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
