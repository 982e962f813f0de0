"""What is said while a long piece of work goes on."""

from __future__ import annotations

import pytest

from ftrun.tasks import pace
from ftrun.tasks.pace import Pace


def test_it_speaks_now_and_then_and_not_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    said, clock = list[str](), [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: clock[0])
    work = Pace(said.append, "{done} of {whole} rows", 10)
    for seconds, count in ((4, 1), (5, 1), (2, 1), (9, 1), (2, 3), (60, 3)):
        clock[0] += seconds
        work.add(count)
    assert said == ["3 of 10 rows", "7 of 10 rows"]
