"""One step is one step: however its rows are cut, packed or padded, fused or plain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ftrun import assemble, stepping
from ftrun.errors import Interrupted, RunFailed
from ftrun.optim import adamw_bnb
from ftrun.optim.paging import PAGED_FROM
from ftrun.runs import cache_dir
from ftrun.train import loop
from ftrun.train.loop import Progress, gradients, train
from ftrun.train.ranks import Ranks
from ftrun.values import Batch
from tests.jobs import tiny_job


def first_gradients(tmp_path: Path, *more: str) -> tuple[float, dict[str, torch.Tensor]]:
    job = tiny_job(tmp_path, "batch=12", *more)
    parts, corpus = built(job)
    work = assemble.work(job, parts, torch.device("cpu"), total=1)
    work.clip = None
    batches = stepping.step_batches(job, corpus, int(job.micro_batch), 0, step=0)
    loss, _ = gradients(work, batches)
    found = {n: p.grad.clone() for n, p in parts.model.named_parameters() if p.grad is not None}
    return float(loss) / sum(b.supervised for b in batches), found


def built(job):  # type: ignore[no-untyped-def]
    parts = assemble.sketch(job, cache_dir(), print, whole=True)
    corpus = assemble.rows(job, parts, cache_dir(), print)
    assemble.furnish(job, parts, torch.device("cpu"), cache_dir(), print, recomputed=0)
    torch.manual_seed(1)
    with torch.no_grad():  # B away from zero, so that A has a gradient as well
        for name, parameter in parts.model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.normal_(std=0.1)
    return parts, corpus


@pytest.mark.parametrize("kernels", ["fast", "reference"])
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("micro_batch", [1, 4, 6])
@pytest.mark.few(6)
def test_micro_batches_equal_one_batch(tmp_path: Path, method: str, kernels: str, micro_batch: int) -> None:
    common = (f"method={method}", f"kernels={kernels}")
    loss, whole = first_gradients(tmp_path, *common, "micro_batch=12")
    cut_loss, cut = first_gradients(tmp_path, *common, f"micro_batch={micro_batch}")
    assert cut_loss == pytest.approx(loss, rel=1e-6)
    assert whole.keys() == cut.keys()
    for name, gradient in whole.items():
        error = float((gradient - cut[name]).norm() / gradient.norm())
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("more", [["method=full"], ["method=full", "layers=last:1"], ["method=lora"], ["method=qdora"]])
def test_fast_is_the_reference_in_bfloat16_too(tmp_path: Path, more: list[str]) -> None:
    """Float32 masters under autocast, and adapters beside bfloat16: to bfloat16's own rounding."""
    common = ("micro_batch=12", "model.dtype=bfloat16", *more)
    (plain, exact), (loss, found) = (first_gradients(tmp_path, *common, f"kernels={k}") for k in ("reference", "fast"))
    assert loss == pytest.approx(plain, rel=3e-3)
    assert exact.keys() == found.keys()
    error = [float((exact[n].float() - found[n].float()).norm() / exact[n].float().norm()) for n in exact]
    assert max(error) < 0.15, max(error)
    assert sum(error) / len(error) < 0.04


def test_recomputation_changes_no_gradient(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "method=lora", "micro_batch=4")
    found = []
    for recomputed in (0, 1, 2):
        parts = assemble.sketch(job, cache_dir(), print, whole=True)
        corpus = assemble.rows(job, parts, cache_dir(), print)
        assemble.furnish(job, parts, torch.device("cpu"), cache_dir(), print, recomputed)
        work = assemble.work(job, parts, torch.device("cpu"), total=1)
        gradients(work, stepping.step_batches(job, corpus, 4, 0, step=0))
        found.append([p.grad for p in parts.model.parameters() if p.grad is not None])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def ready(tmp_path: Path, *more: str, total: int = 4):  # type: ignore[no-untyped-def]
    job = tiny_job(tmp_path, f"steps={total}", "micro_batch=4", *more)
    parts, corpus = built(job)
    work = assemble.work(job, parts, torch.device("cpu"), total)
    work.batches = lambda start: iter([stepping.step_batches(job, corpus, 4, 0, s) for s in range(start, total)])
    return work


@pytest.mark.parametrize("more", [("method=lora", "rank=5"), ("method=dora",), ("method=full",)], ids="-".join)
def test_gathered_parameters_train_as_they_do_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """Losses, gradient norms and weights, bit for bit; with clipping, several micro-batches and two decays."""
    common = (*more, "optim=paged_adamw_32bit", "optim.weight_decay=0.1", "optim.clip=0.5", "lr=1e-2", "batch=8")
    found = []
    for below in (PAGED_FROM, 0):
        monkeypatch.setattr(adamw_bnb.Options, "gathers_below", below)
        work = ready(tmp_path, *common)
        records = [(r.loss, r.grad_norm, r.lr) for r in train(work, Progress())]
        found.append((records, [p.detach().clone() for p in work.model.parameters()]))
        known = sum(len(group["params"]) for group in work.optimiser.param_groups)
        assert (known < len(work.trained)) == bool(below)
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_weights_that_are_loaded_reach_the_optimiser(tmp_path: Path) -> None:
    """As in a run that goes on: the adapter's state is read after the optimiser was made."""
    job = tiny_job(tmp_path, "method=lora", "optim=adamw_8bit")
    parts, _ = built(job)
    work = assemble.work(job, parts, torch.device("cpu"), total=1)
    before = {name: tensor.clone() + 1 for name, tensor in parts.tuner.state(parts.model).items()}
    parts.tuner.load_state(parts.model, before)
    assert all(torch.equal(t, before[n]) for n, t in parts.tuner.state(parts.model).items())
    held = sum(float(p.detach().sum()) for group in work.optimiser.param_groups for p in group["params"])
    assert held == pytest.approx(sum(float(t.sum()) for t in before.values()), rel=1e-5)
    storages = {work.holder(p).untyped_storage()._cdata for p in work.trained}
    assert storages == {p.untyped_storage()._cdata for p in work.trained}
    assert len(storages) == 2  # a layer each


def test_records_follow_the_schedule(tmp_path: Path) -> None:
    work = ready(tmp_path, "method=lora", "lr=1e-3", "optim.warmup=1", "optim.schedule=linear")
    records = list(train(work, Progress()))
    assert [r.step for r in records] == [1, 2, 3, 4]
    assert [r.lr for r in records] == pytest.approx([1e-3 * work.schedule(s) for s in range(4)])
    assert records[0].lr < records[1].lr > records[3].lr


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_rows(tmp_path: Path) -> None:
    work = ready(tmp_path, "method=lora")
    before = [p.detach().clone() for p in work.model.parameters()]
    own = work.loss
    work.loss = lambda batch: own(batch) * float("nan")
    with pytest.raises(RunFailed, match=r"step 1: loss nan.*Rows of the batch: \[\d+"):
        list(train(work, Progress()))
    assert all(torch.equal(a, b) for a, b in zip(before, work.model.parameters(), strict=True))


def test_a_request_to_stop_saves_first(tmp_path: Path) -> None:
    work, saved = ready(tmp_path, "method=lora"), []
    work.save = lambda progress: saved.append(progress.step)
    work.stop = lambda: True
    with pytest.raises(Interrupted, match="after step 1 of 4"):
        list(train(work, Progress()))
    assert saved == [1]


def test_ranks_leave_a_long_step_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They ask one another between micro-batches, where the step before was long."""
    asked: list[int] = []

    class Others(Ranks):
        def any(self, here: bool) -> bool:
            asked.append(progress.step)
            return asked == [0, 1, 1, 1]  # within the second step another one has to leave it

    for long in (0.0, 1e9):
        monkeypatch.setattr(loop, "_LONG", long)
        work, saved, progress = ready(tmp_path, "method=lora", "batch=8", total=2), [], Progress()
        work.ranks, work.save = Others(), lambda progress, saved=saved: saved.append(progress.step)
        asked.clear()
        if long:
            list(train(work, progress))
            assert (saved, asked) == ([2], [0, 1, 1, 2, 2])
            continue
        with pytest.raises(Interrupted, match="after step 1 of 2"):
            list(train(work, progress))
        assert saved == [1]
        assert all(parameter.grad is None for parameter in work.trained)


def test_stops_early_when_evaluations_get_no_better(tmp_path: Path) -> None:
    from ftrun.values import EvalRecord

    work, losses = ready(tmp_path, "method=lora", total=6), iter([2.0, 1.0, 1.5, 1.2, 0.5, 0.1])
    work.evaluate = lambda step: EvalRecord(step, next(losses), 1.0, 1, 0.0)
    work.evaluate_every, work.patience = 1, 2
    best: list[int] = []
    work.save_best = lambda progress: best.append(progress.step)
    said: list[str] = []
    work.say = said.append
    progress = Progress()
    list(train(work, progress))
    assert (progress.step, progress.best_step, best) == (4, 2, [1, 2])
    work.total = 9
    list(train(work, progress))  # more steps are no reason to go on
    assert progress.step == 4
    why = "eval.patience=2: so many evaluations were no better than that of step 2"
    assert said == [f"training ended after step 4 of {total}: {why}" for total in (6, 9)]


def test_a_batch_moves_whole() -> None:
    ids = torch.arange(4)[None]
    batch = Batch(ids, ids, torch.tensor([[-100, 2, 3, -100]]), (4,), True, 4, 2, (0,))
    learnt = [1, 2, *[0] * 6]  # filled up by a place that is not learnt
    assert batch.learnt.tolist() == learnt
    assert batch.to("cpu").learnt.tolist() == learnt
