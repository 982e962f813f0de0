"""One rank of a step that several share: `python -m tests.ranks.step FOLDER OVERRIDES…`, started by ftrun's launcher.

The step is taken by each strategy in turn, in FOLDER/ddp and FOLDER/fsdp.

Leaves in FOLDER what the first rank saw: loss.json (the step's loss, the forward pass before and after
sharding, tensors that sharding changed), gradients.safetensors (whole, by their names in the adapter's file).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from ftrun import assemble, stepping
from ftrun.compose import compose
from ftrun.runs import cache_dir
from ftrun.train.loop import accumulate
from ftrun.train.parallel import full
from ftrun.train.ranks import Ranks, end, join


def say(text: str) -> None:
    """Nothing is of interest here."""


def named_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Every weight of the model, trained ones, frozen ones and quantised ones, whole."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: full(tensor.detach()) for name, tensor in found.items()}


def work(folder: Path, overrides: list[str]) -> None:
    """Assemble, share, take one step's gradients."""
    folder.mkdir(parents=True, exist_ok=True)
    job = compose(overrides)
    ranks: Ranks = join("cpu")
    parts = assemble.sketch(job, cache_dir(), say, whole=True)
    corpus = assemble.rows(job, parts, cache_dir(), say)
    assemble.furnish(job, parts, torch.device("cpu"), cache_dir(), say, recomputed=0)
    for name, parameter in parts.model.named_parameters():  # an update that does something
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    loss = assemble.TokenLoss(parts.model, job.kernels, job.loss_chunk)
    probe = stepping.collated(job, corpus.held_out, [0, 1], 0)
    with torch.no_grad():
        before, tensors = float(loss(probe)), {k: t.clone() for k, t in named_tensors(parts.model).items()}
    parallel = assemble.shared(job, parts, ranks, job.strategy, "cpu")
    with torch.no_grad():
        after = float(parallel.run(loss, probe))
    shared = named_tensors(parts.model)
    changed = [name for name in tensors if not torch.equal(tensors[name], shared[name])]
    made = assemble.work(job, parts, torch.device("cpu"), total=2, parallel=parallel, ranks=ranks)
    made.model.train()
    step = stepping.steps_of(job, corpus) - 1  # the last, which is short of rows
    batches = stepping.step_batches(job, corpus, int(job.micro_batch), 0, step, ranks.rank)
    supervised = ranks.sums([sum(b.supervised for b in batches)])[0]
    total = ranks.sums([float(accumulate(made, batches, supervised))])[0]
    gradients = {name: whole(made, trained.parameter) for name, trained in parts.tuner.named(parts.model).items()}
    local = sum(full_bytes(p) for p in (*parts.model.parameters(), *parts.model.buffers()))
    found = {"loss": total / supervised, "before": before, "after": after, "changed": changed, "bytes": local}
    if ranks.first:
        save_file(gradients, folder / "gradients.safetensors")
        (folder / "loss.json").write_text(json.dumps({**found, "rows": [list(b.rows) for b in batches]}))


def full_bytes(tensor: torch.Tensor) -> int:
    """Bytes that lie here."""
    own = getattr(tensor, "_local_tensor", tensor)
    return own.numel() * own.element_size()


def whole(made: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The gradient of a trained parameter, all of it."""
    held = made.parallel.held(parameter)
    if held is parameter:
        assert parameter.grad is not None
        return parameter.grad.clone().contiguous()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([held.grad.numel()]))
    pieces = [torch.empty(int(size)) for size in sizes]
    for rank, piece in enumerate(pieces):
        if rank == dist.get_rank():
            piece.copy_(held.grad.reshape(-1))
        dist.broadcast(piece, src=rank)
    return torch.cat(pieces).view(parameter.shape)


if __name__ == "__main__":
    for strategy in ("ddp", "fsdp"):
        work(Path(sys.argv[1]) / strategy, [*sys.argv[2:], f"strategy={strategy}"])
    end(0)
