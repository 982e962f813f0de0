"""The desk: the job and a study's wishes go to the ranks, and what ended them comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftrun.errors import Interrupted, RunFailed, UserError
from ftrun.tasks import rank
from ftrun.tasks.desk import Caller, Desk
from ftrun.tasks.shared import Watch
from tests.jobs import tiny_job


def test_the_ranks_get_the_job_and_what_the_study_wants_of_it(tmp_path: Path) -> None:
    job, heard = tiny_job(tmp_path, "method=lora", "devices=2"), []
    asked = [False, True]

    def verdict(step: int, loss: float) -> bool:
        heard.append((step, loss))
        return step < 4

    watch = Watch(6, frozenset({2, 4}), verdict, lambda: asked.pop(0))
    with Desk(job, watch) as desk:
        caller, other = Caller(desk.name), Caller(desk.name)
        told = caller.ask("job")
        assert rank.make_job(told["tree"], told["choices"], borrowed=set(told["tree"])).as_dict() == job.as_dict()
        first, second = caller.watch(told, True), other.watch(other.ask("job"), False)
        assert first is not None
        assert second is not None
        assert (first.until, first.rungs, second.rungs) == (6, watch.rungs, watch.rungs)
        assert first.goes_on(2, 1.5)
        assert (first.halts(2), first.halts(3)) == (False, True)
        assert not first.goes_on(4, float("inf"))
        assert (first.pruned, watch.pruned) == (True, True)
        assert not second.halts(7)  # the first one speaks for all
    assert heard == [(2, 1.5), (4, float("inf"))]


def test_nobody_watches_a_job_of_its_own(tmp_path: Path) -> None:
    with Desk(tiny_job(tmp_path, "devices=2")) as desk:
        caller = Caller(desk.name)
        assert caller.watch(caller.ask("job"), True) is None


@pytest.mark.parametrize(
    ("error", "cause", "told"),
    [
        (RunFailed("loss nan: not finite"), None, "RunFailed('loss nan: not finite')"),
        (UserError("no such file"), None, "UserError('no such file')"),
        (Interrupted("stopped after step 3"), None, "Interrupted('stopped after step 3')"),
        (Interrupted("interrupted"), KeyboardInterrupt(), "None"),  # the launcher's signal, for another rank's end
        (RuntimeError("Connection closed by peer"), None, "None"),
    ],
)
def test_a_rank_says_why_it_ends_where_the_reason_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, cause: BaseException | None, told: str
) -> None:
    def work(run: Path, caller: Caller) -> None:
        raise error from cause

    monkeypatch.setattr(rank, "work", work)
    monkeypatch.setattr(rank, "die_with_parent", lambda parent: None)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with Desk(tiny_job(tmp_path, "devices=2")) as desk:
        assert rank.main(tmp_path, desk.name) == getattr(error, "exit_code", 4)
        assert repr(desk.ended) == told


def test_a_job_of_another_line_is_refused(tmp_path: Path) -> None:
    one, other = (tiny_job(tmp_path, "devices=2", f"lr={lr}", f"name={lr}") for lr in ("1e-3", "1e-4"))
    rank._check_same(one.as_dict(), one, 1)
    with pytest.raises(UserError, match=r"(?s)rank 1 on .* another job than the first rank.*lr: 0.001 there, 0.0001"):
        rank._check_same(one.as_dict(), other, 1)
