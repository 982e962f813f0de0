"""Below the lowest trained layer nothing is recorded, nothing is kept, and nothing is computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ftrun import assemble, stepping
from ftrun.planning.settle import layer_counts, notes, rows_of_seq_len, settle
from ftrun.planning.twin import Twin
from ftrun.runs import cache_dir
from ftrun.train.recompute import _call
from tests.jobs import tiny_base, tiny_job

DEPTH, BELOW = 6, 4
METHODS = (["method=lora"], ["method=dora"], ["method=full"], ["method=qlora"], ["method=houlsby"])


def built(tmp_path: Path, *more: str, recomputed: int = 0) -> tuple[Any, Any, Any]:
    """(job, parts, work) of six real layers."""
    tiny_base(tmp_path / "llama", "llama", num_hidden_layers=DEPTH)
    job = tiny_job(tmp_path, *more)
    parts = assemble.sketch(job, cache_dir(), print, whole=True)
    assemble.furnish(job, parts, torch.device("cpu"), cache_dir(), print, recomputed)
    return job, parts, assemble.work(job, parts, torch.device("cpu"), total=2)


def recomputed_layers(parts: Any) -> list[int]:
    forwards = [getattr(layer.forward, "func", None) for layer in assemble.decoder(parts)]
    return [number for number, forward in enumerate(forwards) if forward is _call]


@pytest.mark.parametrize("kernels", ["fast", "reference"])
@pytest.mark.parametrize("recomputed", [0, 1, DEPTH])
@pytest.mark.parametrize("more", METHODS, ids="-".join)
@pytest.mark.few(8)
def test_nothing_below_is_recorded(tmp_path: Path, more: list[str], recomputed: int, kernels: str) -> None:
    job, parts, work = built(
        tmp_path, *more, f"layers=last:{DEPTH - BELOW}", f"kernels={kernels}", recomputed=recomputed
    )
    assert assemble.frozen_below(parts) == BELOW
    assert recomputed_layers(parts) == list(range(BELOW, min(DEPTH, BELOW + recomputed)))
    corpus = assemble.rows(job, parts, cache_dir(), print)
    kept: list[int] = []  # the layer at work as each tensor was kept for the backward pass
    recorded: dict[int, bool] = {}
    at = [-1]

    def entering(number: int) -> Any:
        return lambda module, arguments: at.__setitem__(0, number)

    def left(number: int) -> Any:
        def leave(module: nn.Module, arguments: Any, out: Any) -> None:
            hidden = out if isinstance(out, torch.Tensor) else out[0]
            recorded[number] = hidden.grad_fn is not None

        return leave

    for number, layer in enumerate(assemble.decoder(parts)):
        layer.register_forward_pre_hook(entering(number))
        layer.register_forward_hook(left(number))
    work.model.train()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(at[0]) or t, lambda t: t), work.autocast():
        loss = work.loss(stepping.step_batches(job, corpus, 4, 0, step=0)[0])
    assert recorded == {number: number >= BELOW for number in range(DEPTH)}
    assert min(kept) == BELOW
    loss.backward()
    for number, layer in enumerate(assemble.decoder(parts)):
        assert any(p.grad is not None for p in layer.parameters()) == (number >= BELOW)


@pytest.mark.parametrize(
    ("more", "below"),
    [
        (["method=lora"], 0),
        (["method=lora", "layers=[2,5]"], 2),
        (["method=lora", "layers=last:2", "targets=[q_proj,embeddings]"], 0),
        (["method=lora", "layers=last:2", "method.modules_to_save=[embeddings]"], 0),
        (["method=lora", "layers=last:2", "targets=[q_proj,head]"], 4),
        (["method=lora", "targets=head"], DEPTH),
        (["method=prompt"], 0),
        (["method=full"], 0),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, list) else str(v),
)
def test_what_lies_below_all_that_trains(tmp_path: Path, more: list[str], below: int) -> None:
    job, parts, _ = built(tmp_path, *more)
    twin = Twin(job, assemble.sketch(job, cache_dir(), print))
    assert (assemble.frozen_below(parts), twin.below, twin.graphs) == (below, below, DEPTH - below)


def test_recomputation_counts_from_the_lowest_trained_layer_on(tmp_path: Path) -> None:
    tiny_base(tmp_path / "llama", "llama", num_hidden_layers=DEPTH)
    for asked, counts, said in (("all", [2], 0), ("auto", [0, 2], 0), ("1", [1], 0), ("5", [2], 1), ("none", [0], 0)):
        job = tiny_job(tmp_path, "method=lora", "layers=last:2", f"checkpointing={asked}")
        twin = Twin(job, assemble.sketch(job, cache_dir(), print))
        assert layer_counts(job, twin.graphs) == counts
        assert len(notes(job, twin)) == said
        found = settle(job, twin, rows_of_seq_len(job), twin.device, "seq_len")
        assert found.recomputed == found.plan.checkpointing in counts
        assert found.plan.without_graph == BELOW


def test_fewer_layers_are_kept_where_more_are_recomputed(tmp_path: Path) -> None:
    """The first recomputed layer saves as much as any: it is none of the frozen ones."""
    tiny_base(tmp_path / "llama", "llama", num_hidden_layers=DEPTH)
    job = tiny_job(tmp_path, "method=lora", "layers=last:2")
    twin = Twin(job, assemble.sketch(job, cache_dir(), print))
    batches = rows_of_seq_len(job)(4)[0][1]
    none, one = (twin.step(batches, layers).peak.peak for layers in (0, 1))
    assert none.total > one.total
