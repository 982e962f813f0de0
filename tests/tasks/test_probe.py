"""The probe: its scores are what a step really buys, it leaves no trace, it needs no more than the plan."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ftrun import assemble
from ftrun.errors import UserError
from ftrun.memory.events import allocations
from ftrun.runs import cache_dir
from ftrun.tasks import probe as task
from ftrun.tasks.shared import Shared
from ftrun.train.loop import accumulate
from tests.jobs import tiny_job

SHORT = ("steps=4", "batch=8", "checkpointing=none")


def scores(found: dict[str, Any]) -> dict[str, float]:
    return {place["name"]: place["score"] for place in found["places"]}


@pytest.mark.parametrize(
    ("optim", "method"), [("optim=adamw", "method=lora"), ("optim=sgd", "method=lora"), ("optim=adamw", "method=full")]
)
@pytest.mark.few(1)
def test_a_score_is_what_the_first_step_there_takes_from_the_loss_of_other_rows(
    tmp_path: Path, optim: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each half's step is taken for real, at one place alone, and the fall on the other half is measured."""
    monkeypatch.setattr(task, "_COPY", torch.float32)
    job = tiny_job(tmp_path, method, optim, "lr=1e-6", *SHORT)
    kept: dict[str, Any] = {}
    own = task._scores

    def spied(work: Any, halves: Any, *more: Any) -> Any:
        kept.update(work=work, halves=halves)
        return own(work, halves, *more)

    monkeypatch.setattr(task, "_scores", spied)
    found = task.probe(job, Shared(), rows=16)
    work, halves = kept["work"], kept["halves"]
    assert len(halves) == 2
    wanted = [place for place in found["places"] if place["path"] in ("self_attn.v_proj", "mlp.down_proj")]
    for place in wanted:
        module = work.model.get_submodule(place["name"])
        own_parameters = [p for p in module.parameters() if p.requires_grad]
        falls = [fall(work, own_parameters, *pair, job) for pair in (halves, halves[::-1])]
        assert place["score"] == pytest.approx(sum(falls) / 2, rel=0.03), place["name"]
        assert place["score"] != 0


def fall(work: Any, parameters: list[torch.Tensor], one: Any, other: Any, job: Any) -> float:
    """What a step by the gradient of `one` takes from the mean loss of `other`."""
    work.model.zero_grad(set_to_none=True)
    accumulate(work, one)
    sgd = job.optim.kind == "sgd"
    steps = [p.grad.clone() if sgd else p.grad.sign() for p in parameters]
    work.model.zero_grad(set_to_none=True)
    # large enough for float32's digits, small enough to be a step to first order
    size = 1e-3 / max(float(step.norm()) for step in steps)
    losses = []
    for sign in (-1, 2, -1):
        with torch.no_grad():
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.add_(sign * size * step)
            losses.append(sum(float(work.loss(b).double()) for b in other) / sum(b.supervised for b in other))
    return job.lr * (losses[1] - losses[0]) / (2 * size)


def test_it_leaves_no_trace_and_says_the_same_again(tmp_path: Path) -> None:
    job, shared = tiny_job(tmp_path, "method=lora", *SHORT), Shared(keeps=True, counts=True)
    first = task.probe(job, shared, rows=16)
    assert shared.shelf is not None
    assert shared.shelf.bytes > 0
    assert shared.shelf.changed() == []
    assert json.loads(json.dumps(task.probe(job, shared, rows=16))) == first
    assert not (tmp_path / "run").exists()
    assert (first["rows"], first["halves"], first["depth"], first["asked"]) == (
        16,
        2,
        2,
        {"layers": "all", "targets": "all"},
    )


@pytest.mark.parametrize(
    "more",
    [
        ("method=lora",),
        ("method=full",),
        ("method=lora", "optim=sgd", "optim.momentum=0"),
        ("method=qlora", "optim=adamw"),
    ],
    ids=" ".join,
)
def test_it_needs_no_more_than_was_planned(
    tmp_path: Path, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, shared = tiny_job(tmp_path, *more, *SHORT), Shared(counts=True)
    own, peaks = task._scores, []

    def watched(work: Any, *rest: Any) -> Any:
        gc.collect()
        tensors = {t.untyped_storage()._cdata: t for t in (*work.model.parameters(), *work.model.buffers())}
        with allocations() as seen:
            found = own(work, *rest)
        peaks.append(sum(t.untyped_storage().nbytes() for t in tensors.values()) + seen.peak)
        return found

    monkeypatch.setattr(task, "_scores", watched)
    task.probe(job, shared, rows=32)
    (prepared,) = shared._prepared.values()
    assert 0.3 * prepared.settled.plan.peak_bytes < peaks[0] <= prepared.settled.plan.peak_bytes


def test_where_no_room_is_left_for_a_copy_one_pass_tells(tmp_path: Path) -> None:
    room = tiny_job(tmp_path, "method=full", "optim=sgd", "optim.momentum=0", *SHORT)
    assert task.probe(room, Shared(), rows=8)["halves"] == 2
    plan = next(iter(_prepared(room).values())).settled.plan
    share = plan.device["usable_bytes"] / plan.device["free_bytes"]
    tight = round((plan.needed_bytes + 1000) / share)
    job = tiny_job(tmp_path, "method=full", "optim=sgd", "optim.momentum=0", f"device.memory={tight}B", *SHORT)
    usable = next(iter(_prepared(job).values())).settled.plan.device["usable_bytes"]
    assert plan.needed_bytes <= usable < plan.needed_bytes + 2 * plan.trainable_params
    found = task.probe(job, Shared(), rows=8)
    assert found["halves"] == 1
    assert all(place["score"] > 0 for place in found["places"])


def _prepared(job: Any) -> dict[str, Any]:
    shared = Shared()
    task.probe(job, shared, rows=2)
    return shared._prepared


@pytest.mark.parametrize(
    ("more", "named", "unnamed"),
    [
        (("method=dora",), {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, set()),
        (("method=qlora", "targets=[q_proj,head]"), {"q_proj", "head"}, set()),
        (("method=houlsby",), {"o_proj", "down_proj"}, set()),
        (("method=houlsby", "method.placement=parallel"), set(), {"mlp"}),
        (("method=full", "layers=[1]", "targets=mlp"), {"gate_proj", "up_proj", "down_proj"}, set()),
        (("method=lora", "targets=[v_proj]", "method.modules_to_save=[head]"), {"v_proj"}, {"lm_head"}),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else "",
)
def test_places_of_every_method(tmp_path: Path, more: tuple[str, ...], named: set[str], unnamed: set[str]) -> None:
    """All that trains is at one place or another, and `targets` can name those that it named."""
    job = tiny_job(tmp_path, *more, *SHORT)
    places = task.probe(job, Shared(), rows=8)["places"]
    assert {place["kind"] for place in places if place["can"]} == named
    assert {place["kind"] for place in places if not place["can"]} == unnamed
    assert {place["layer"] for place in places} - {None} == ({1} if "layers=[1]" in more else {0, 1})
    assert all((place["layer"] is None) == (place["name"] == "lm_head") for place in places)
    parts = assemble.sketch(job, cache_dir(), print)
    assemble.attach(job, parts)
    assert sum(place["parameters"] for place in places) == assemble.counts(parts)[1]


def test_full_tuning_of_everything_has_norms_and_embeddings_that_targets_cannot_name(tmp_path: Path) -> None:
    places = task.probe(tiny_job(tmp_path, "method=full", *SHORT), Shared(), rows=8)["places"]
    unnamed = {(place["path"], place["layer"]) for place in places if not place["can"]}
    norms = {(f"{where}_layernorm", layer) for where in ("input", "post_attention") for layer in (0, 1)}
    assert unnamed == norms | {(name, None) for name in ("model.embed_tokens", "model.norm", "lm_head")}


def test_names_that_two_parts_share_are_told_apart(tmp_path: Path) -> None:
    found = task.probe(tiny_job(tmp_path, "method=lora", *SHORT, family="gpt2"), Shared(), rows=8)
    assert {place["kind"] for place in found["places"]} == {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}


def test_noise_scores_nothing() -> None:
    """Halves that agree score what the plain norm says; halves that have nothing in common about zero."""
    torch.manual_seed(0)
    one, other = torch.randn(2, 20_000)
    plain = task._fall(one, one, 1.0, by_gradient=False)[0]
    assert plain == pytest.approx(float(one.abs().sum()))
    assert abs(task._fall(one, other, 1.0, by_gradient=False)[0]) < 0.03 * plain
    assert abs(task._fall(one, other, 1.0, by_gradient=True)[0]) < 0.03 * float(one.square().sum())


@pytest.mark.parametrize(
    ("more", "by", "message"),
    [
        (("method=prompt",), "layers", "method=prompt: has no layers to choose from; search=layers works with dora"),
        (("method=houlsby",), "targets", "method=houlsby: has no targets to choose from"),
    ],
)
def test_methods_without_places_say_so(tmp_path: Path, more: tuple[str, ...], by: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task.probe(tiny_job(tmp_path, *more, *SHORT), Shared(), rows=8, by=by)
