"""What a study's rows hold: the best, the smallest about as good, the front, what each key does."""

from __future__ import annotations

import pytest

from ftrun.errors import UserError
from ftrun.report.study_rows import choices, effects, front, plain, ranked, read, smallest, varied
from ftrun.report.study_summary import summary
from tests.report.studies import BASE, ended, grid_study, rank_study, row, study


def test_the_best_is_the_lowest_loss_or_the_highest_speed() -> None:
    rows = grid_study()
    by_loss = min((r for r in rows if r["figures"]), key=lambda r: r["figures"]["loss"])
    by_speed = max((r for r in rows if r["figures"]), key=lambda r: r["figures"]["tokens_per_s"])
    assert ranked(read(rows), "loss")[0].number == by_loss["number"]
    assert ranked(read(rows), "tokens_per_s")[0].number == by_speed["number"] != by_loss["number"]


def test_figures_that_are_no_numbers_take_no_part() -> None:
    rows = study(rank=["4", "8", "16", "32"])
    for one, value in zip(rows, (float("nan"), float("inf"), None, 2.5), strict=True):
        one["figures"]["loss"] = value
    assert [found.number for found in ranked(read(rows), "loss")] == [4]
    assert [one.shown("loss") for one in read(rows)] == ["nan", "inf", "", "2.5000"]


def test_an_objective_that_cannot_be_judged_is_named() -> None:
    with pytest.raises(UserError, match=r"objective 'los' is unknown\. Did you mean 'loss'"):
        summary(rank_study(), "los")
    with pytest.raises(UserError, match="objective 'steps'"):
        summary(rank_study(), "steps")


def test_the_front_is_what_no_point_beats() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.0), (4.0, 1.0), (5.0, 2.0), (1.0, 6.0)]
    beaten = {i for i, (x, y) in enumerate(points) if any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)}
    assert set(front(points)) == set(range(len(points))) - beaten == {0, 1, 4}


def test_the_smallest_within_one_per_cent_trains_the_fewest_parameters() -> None:
    rows = study(rank=["4", "8", "16", "32"])
    for one, loss in zip(rows, (2.40, 2.321, 2.31, 2.30), strict=True):
        one["figures"]["loss"] = loss
    found = smallest(read(rows), "loss")  # up to 2.323
    assert found is not None
    assert found.values == {"rank": "8"}
    rows[1]["figures"]["loss"] = 2.324
    found = smallest(read(rows), "loss")
    assert found is not None
    assert found.values == {"rank": "16"}


def test_what_a_key_does_is_what_its_worst_value_costs_at_best() -> None:
    rows = study(method=["a", "b"], rank=["4", "8"])
    for one, loss in zip(rows, (2.0, 2.5, 2.1, 2.2), strict=True):
        one["figures"]["loss"] = loss
    assert effects(read(rows), "loss") == pytest.approx({"rank": 0.2, "method": 0.1})
    assert [*effects(read(rows), "loss")] == ["rank", "method"]


def test_values_stand_in_the_order_of_numbers_or_as_typed() -> None:
    rows = read(study(rank=["16", "4", "8"], layers=["all", "8", "first:10"], lr=["1e-3"]))
    assert choices(rows, "rank") == ["4", "8", "16"]
    assert choices(rows, "layers") == ["all", "8", "first:10"]
    assert varied(rows) == ["rank", "layers"]


def test_a_run_that_is_the_same_as_another_has_its_figures() -> None:
    rows = [*study(rank=["4", "8"]), ended(3, {"rank": "16"}, "same", None) | {"same_as": 2}]
    rows.append(ended(4, {"rank": "32"}, "same", None) | {"same_as": 3})
    there = read(rows)
    assert [one.number for one in ranked(there, "loss")] == [2, 3, 4, 1]
    assert there[3].figure("loss") == rows[1]["figures"]["loss"]
    rows[1] = ended(2, {"rank": "8"}, "failed", "lost")
    assert [one.number for one in ranked(read(rows), "loss")] == [1]
    circle = [ended(n, {"rank": str(n)}, "same", None) | {"same_as": 3 - n} for n in (1, 2)]
    assert not any(one.done for one in read(circle))


def test_text_that_breaks_a_terminal_or_a_file_is_taken_out() -> None:
    assert plain("a\x1b[31mb\x00\n\tc \ud800 d") == "a [31mb c d"


def test_the_summary_says_the_numbers() -> None:
    rows = study(rank=["4", "8", "16"], layers=["all", "last:8"])
    rows[3] = ended(4, rows[3]["values"], "failed", "no memory")
    rows[5] = ended(6, rows[5]["values"], "failed", "no memory")
    for number, loss in ((0, 2.33), (1, 2.45), (2, 2.32), (4, 2.31)):
        rows[number]["figures"] |= {"loss": loss, "peak_bytes": 230_000_000 + number, "trainable_params": 100 + number}
    assert summary(rows) == [
        "4 of 6 done, 2 failed.",
        f"Best: rank=16 layers=all, held-out loss 2.3100 (base {BASE}), at 230.0 MB, 104 parameters trained.",
        "The smallest within 1% of it: rank=4 layers=all, held-out loss 2.3300, at 230.0 MB, 100 parameters trained.",
        "Most depends on layers: with all else at its best, its worst value costs 0.1400 of held-out loss; "
        "rank 0.0200.",
    ]


def test_the_summary_of_what_came_to_nothing_or_is_alone() -> None:
    failed = [ended(n, {"rank": str(n)}, "failed", "x") for n in (1, 2)]
    assert summary(failed) == ["0 of 2 done, 2 failed.", "No run has a held-out loss to compare."]
    assert summary([]) == ["No runs.", "No run has a held-out loss to compare."]
    (count, best) = summary([row(1, {"rank": "8"})])
    assert count == "1 of 1 done."
    assert best.startswith("rank=8, held-out loss 2.3479 (base 3.3921), at ")


def test_keys_that_change_together_are_not_told_apart() -> None:
    rows = study(rank=["4", "8"], steps=["5", "51"])
    for one, loss in zip(rows, (3.0, 2.0, 2.9, 1.9), strict=True):
        one["values"]["method"] = "lora" if one["values"]["steps"] == "5" else "qlora"
        one["figures"]["loss"] = loss
    said = [line for line in summary(rows) if line.startswith("Most depends")]
    assert said == [
        "Most depends on steps with method: with all else at its best, its worst value costs 1.0000 of held-out loss; "
        "rank 0.1000."
    ]
    alone = [one for one in rows if one["values"]["rank"] == "4"]
    assert not any("depends" in line for line in summary(alone))
