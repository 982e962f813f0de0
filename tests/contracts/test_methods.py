"""What holds for every method that conf/ names, a newcomer's too: end to end through the run's own road."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftrun import assemble, stepping
from ftrun.groups import choices_of
from ftrun.methods.files import load_adapter
from ftrun.runs import cache_dir
from ftrun.tasks import train as task
from ftrun.train.loop import Progress, gradients, train, update
from tests.jobs import tiny_base, tiny_job

METHODS = choices_of("method")


def furnished(job, recomputed: int = 0):  # type: ignore[no-untyped-def]
    parts = assemble.sketch(job, cache_dir(), print, whole=True)
    corpus = assemble.rows(job, parts, cache_dir(), print)
    assemble.furnish(job, parts, torch.device("cpu"), cache_dir(), print, recomputed)
    return parts, corpus


def logits(job, parts, corpus) -> torch.Tensor:  # type: ignore[no-untyped-def]
    batch = stepping.evaluation_batches(job, corpus, 4, 4, 0)[0]
    with torch.no_grad():
        return assemble.TokenLoss(parts.model.eval(), job.kernels).logits(batch)


@pytest.fixture(scope="module", params=METHODS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A finished run of three steps of each method, its job and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    job = tiny_job(folder, f"method={request.param}", "steps=3", "lr=1e-2", "optim=adamw", "checkpointing=none")
    assert task.run(job) == 0
    return job, folder


def test_what_is_saved_loads_again_with_the_same_logits(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    job, folder = trained
    live, corpus = furnished(job)
    before = logits(job, live, corpus)
    made = folder / "run" / "adapter"
    if not made.is_dir():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder / "run" / "model")
        live.tuner.load_state(live.model, model.state_dict())
        batch = stepping.evaluation_batches(job, corpus, 1, 1, 0)[0]
        alone = model(batch.input_ids).logits
        ours = logits(job, live, corpus)[:, : alone.shape[1]]
        assert float((alone - ours).detach().abs().max()) < 1e-4 * float(alone.detach().abs().max())
        return
    config, tensors = load_adapter(made)
    live.tuner.check(config)
    live.tuner.load_state(live.model, tensors)
    after = logits(job, live, corpus)
    assert not torch.equal(before, after), "three steps changed nothing"
    again, _ = furnished(tiny_job(folder, f"method={job.method.choice}", f"out={tmp_path}/x"))
    again.tuner.load_state(again.model, tensors)
    assert torch.equal(after, logits(job, again, corpus))


def test_only_what_it_declares_trains(trained) -> None:  # type: ignore[no-untyped-def]
    job, folder = trained
    parts, corpus = furnished(job)
    untouched = {n: p.detach().clone() for n, p in parts.model.named_parameters() if not p.requires_grad}
    declared = {id(p) for group in parts.tuner.groups(parts.model).values() for p in group}
    assert declared == {id(p) for p in parts.model.parameters() if p.requires_grad}
    work = assemble.work(job, parts, torch.device("cpu"), total=3)
    parts.model.train()
    gradients(work, stepping.step_batches(job, corpus, 4, 0, 0))
    update(work)
    assert all(torch.equal(p, untouched[n]) for n, p in parts.model.named_parameters() if n in untouched)
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["trainable_params"] == sum(p.numel() for p in parts.model.parameters() if p.requires_grad)


def test_merged_gives_the_same_logits(trained) -> None:  # type: ignore[no-untyped-def]
    job, folder = trained
    parts, corpus = furnished(job)
    if not parts.tuner.merges or not (folder / "run" / "adapter").is_dir():
        assert parts.tuner.why_not or job.method.kind == "full"
        return
    tensors = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    parts.tuner.load_state(parts.model, tensors)
    apart = logits(job, parts, corpus)
    parts.tuner.merge(parts.model)
    merged = logits(job, parts, corpus)
    assert float((apart - merged).abs().max()) < 1e-5 * float(apart.abs().max())
    parts.tuner.unmerge(parts.model)
    assert torch.equal(apart, logits(job, parts, corpus))


def test_its_planned_bytes_are_its_real_bytes(trained) -> None:  # type: ignore[no-untyped-def]
    _, folder = trained
    memory = json.loads((folder / "run" / "result.json").read_text())["memory"]
    # a tiny model's peak is a few MB: what is left are the random-number and bookkeeping tensors, some kB
    assert abs(memory["error"]) < 0.02, memory


def test_it_learns_32_rows(trained) -> None:  # type: ignore[no-untyped-def]
    """On a random tiny model; the real one's figures come from scripts/overfit.py."""
    job, folder = trained
    # a frozen head of small weights bounds the logits, and with them how sure any method can become
    sharp = tiny_base(folder / "sharp", initializer_range=0.3)
    rate = {"full": "3e-3", "prompt": "0.3"}.get(job.method.choice, "1e-2")
    more = ("data.held_out=0", "batch=32", "data.limit=32", "steps=200", f"lr={rate}", "optim=adamw")
    more += ("optim.schedule=constant", "checkpointing=none", "eval=none", "seed=3")
    job = tiny_job(folder, f"method={job.method.choice}", f"model.path={sharp}", *more)
    parts, corpus = furnished(job)
    work = assemble.work(job, parts, torch.device("cpu"), 200)
    work.batches = lambda start: iter([stepping.step_batches(job, corpus, 32, 0, 0)] * 200)
    first = loss = None
    for record in train(work, Progress()):
        loss, first = record.loss, first or record.loss
        if loss <= (0.7 * first if job.method.choice == "prompt" else 0.1):
            return
    pytest.fail(f"{first} -> {loss} in 200 steps")
