"""The curves of a study's page: each can be seen, also where two are the same."""

from __future__ import annotations

from ftrun.report.plots.runs import training
from ftrun.report.study_rows import read
from tests.report.studies import rank_study


def test_curves_that_coincide_both_show() -> None:
    rows = rank_study()
    drawn = training(read(rows), "loss")
    assert drawn is not None
    assert "dashed" not in drawn.caption
    rows[1]["curve"] = [[step, loss + 1e-5] for step, loss in rows[0]["curve"]]
    drawn = training(read(rows), "loss")
    assert drawn is not None
    assert "A dashed line lies on another run's." in drawn.caption
    assert drawn.svg.count("stroke-dasharray") > training(read(rank_study()), "loss").svg.count("stroke-dasharray")  # type: ignore[union-attr]
