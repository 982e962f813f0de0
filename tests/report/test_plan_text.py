"""Plans in words and pictures."""

from __future__ import annotations

import pytest

from ftrun.report.plan_text import _bar, _columns, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (426_502_348, "426.5 MB"),
        (45.3e9, "45.30 GB"),
        (2e12, "2,000.00 GB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_the_bar_is_as_long_as_its_shares() -> None:
    bar = _bar({"weights": 30, "adapters": 20, "activations": 10}).plain.strip()
    assert (bar.count("█"), bar.count("▒"), bar.count("a")) == (30, 20, 10)


def test_a_long_step_keeps_its_highest_instant_and_every_part() -> None:
    timeline = [{"at": f"forward of layer {n}", "bytes": n, "by_role": {"weights": n}} for n in range(200)]
    timeline[101]["bytes"] = 1000
    timeline += [{"at": "loss", "bytes": 5, "by_role": {"weights": 5}}]
    columns = _columns(timeline)
    assert len(columns) <= 73
    assert max(c["bytes"] for c in columns) == 1000
    assert [c["at"] for c in columns if c["first"]] == ["forward", "loss"]
