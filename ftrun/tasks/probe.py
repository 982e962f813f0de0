"""What one pass of gradients says of each place that a job trains: how far a step there would lower the loss.

A place is a module of the model with what the job's method trains at it: B A beside a linear layer, a bottleneck, or
the module's own weights. Its score is the fall of the loss, in nats a token, that the first step of the job's
optimiser buys there, to first order. Adam, Lion and Adafactor step by their rate whatever the size of the gradient:
Σ rate·|g|, as of sign descent (Bernstein et al. 2018, arXiv:1802.04434; Balles & Hennig 2018, arXiv:1705.07774). SGD
steps by rate·g: Σ rate·g². The falls of several places add up, and modules of unequal width compare by what they buy.

Why not a saliency |w·g| (as AdaLoRA's, arXiv:2303.10512): B starts at zero, and so do |B·g| and the gradient of A.
What tells is the gradient of B, under the very A that training begins with; drawn in ±1/√in, it gives A x one size at
any width.

The step is that of one half of the rows, the fall is measured on the other, and both ways: what only a few rows want
does not count, and noise alone scores zero on average. Nothing is trained, written or left in the base's weights.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ftrun import assemble, stepping
from ftrun.errors import RunFailed, UserError
from ftrun.groups import owners
from ftrun.job import Job
from ftrun.methods.base import Trained, wrappers
from ftrun.methods.files import file_size
from ftrun.metrics.console import Console
from ftrun.models.select import anatomy as find_anatomy
from ftrun.runs import cache_dir
from ftrun.tasks.session import Session
from ftrun.tasks.shared import Shared
from ftrun.train.loop import Work, accumulate
from ftrun.values import Batch

_COPY = torch.bfloat16  # of the first half's gradients: float32's range, and their signs exactly


@dataclass
class Place:
    """A module with what is trained at it. trained: by its names in the file.

    layer: of the decoder, None outside. path: its name within the layer. kind: the shortest name that `targets` knows
    all modules of its sort by. can: whether `targets` can name it.
    """

    name: str
    layer: int | None
    path: str
    kind: str
    can: bool
    trained: dict[str, Trained] = field(default_factory=dict)


def probe(job: Job, shared: Shared, rows: int = 32, by: str = "layers") -> dict[str, Any]:
    """What a search is told, JSON-able; `places` holds a dict for each, in the order of the model.

    rows: rows of the training data, those of the job's first steps, taken evenly where they are more. by: the option
    that a search is going to choose with, layers or targets. Raises UserError where the method has no such option,
    DoesNotFit, and RunFailed where a loss or a gradient is not finite.
    """
    options = job.method.options
    if not hasattr(options, by):
        names = ", ".join((owners(by) or ("", []))[1])
        raise UserError(f"method={job.method.choice}: has no {by} to choose from; search=layers works with {names}")
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        session = Session(job, cache_dir(), Console(file=nowhere), shared)
        session.prepare(Path(str(job.out)))
        places = _sites(session.parts)
        work = _assembled(session)
    _fill(places, session.parts)
    halves = _halves(session, rows)
    by_gradient = job.optim.typed().by_gradient
    loss, scores = _scores(work, halves, _rates(session), by_gradient)
    return {
        "rows": sum(len(batch.rows) for half in halves for batch in half),
        "halves": len(halves),
        "loss": loss,
        "steps_by": "gradient" if by_gradient else "sign",
        "depth": session.parts.anatomy.depth,
        "asked": {key: getattr(options, key) for key in ("layers", "targets") if hasattr(options, key)},
        "adapter": bool(session.parts.tuner.adapter_config(session.parts.anatomy, "")),
        "places": [_row(place, scores) for place in places.values() if place.trained],
    }


def _assembled(session: Session) -> Work:
    """The job's model at step 0, as training begins with it."""
    device, parts, job = assemble.torch_device(session.device), session.parts, session.job
    torch.manual_seed(job.seed)
    recomputed, shelf = session.settled.recomputed, session.shared.shelf
    assemble.furnish(job, parts, device, session.cache, session.console.say, recomputed, shelf)
    work = assemble.work(job, parts, device, session.total)
    work.model.train()
    return work


# --- places ---


def _sites(parts: assemble.Sketch) -> dict[str, Place]:
    """What can be tuned, by its name in the bare model: every linear layer and what the job's targets name besides."""
    anatomy, stem = parts.anatomy, assemble.stack_name(parts)
    every = {site.name: site for found in (find_anatomy(parts.model, "all", "all"), anatomy) for site in found.sites}
    chosen = {site.name for site in anatomy.sites}
    split = {name: _split(name, stem) for name in every}
    paths: dict[str, set[str]] = {}
    for _, path in split.values():
        paths.setdefault(path.rpartition(".")[2], set()).add(path)
    found = {}
    for name, (layer, path) in split.items():
        leaf = path.rpartition(".")[2]
        kind = leaf if len(paths[leaf]) == 1 else path
        kind = every[name].role if name in (anatomy.embeddings, anatomy.head) else kind
        found[name] = Place(name, layer, path, kind, name in chosen)
    return found


def _split(name: str, stem: str) -> tuple[int | None, str]:
    """("model.layers.3.mlp.up_proj", "model.layers") -> (3, "mlp.up_proj")."""
    match = re.match(rf"{re.escape(stem)}\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def _fill(places: dict[str, Place], parts: assemble.Sketch) -> None:
    """Put each trained tensor to its place; norms, whole feed-forwards and the like get places of their own."""
    stem, owner = assemble.stack_name(parts), dict(_owners(places, parts))
    for name, trained in parts.tuner.named(parts.model).items():
        module = owner[id(trained.parameter)]
        if module not in places:
            layer, path = _split(module, stem)
            places[module] = Place(module, layer, path, path.rpartition(".")[2], False)
        places[module].trained[name] = trained


def _owners(places: Mapping[str, Place], parts: assemble.Sketch) -> Iterator[tuple[int, str]]:
    """(id of a trained parameter, the module that it belongs to)."""
    wrapped = {id(t.parameter): wrapper.name for wrapper in wrappers(parts.model) for t in wrapper.own().values()}
    for name, parameter in parts.model.named_parameters():
        if parameter.requires_grad:  # experts' weights are named themselves
            own = name if name in places else name.rpartition(".")[0]
            yield id(parameter), wrapped.get(id(parameter), own)


def _row(place: Place, scores: Mapping[int, tuple[float, float]]) -> dict[str, Any]:
    own = [scores[id(t.parameter)] for t in place.trained.values()]
    tensors = {name: t.write(t.parameter.detach()) for name, t in place.trained.items()}
    return {
        "name": place.name,
        "layer": place.layer,
        "path": place.path,
        "kind": place.kind,
        "can": place.can,
        "score": sum(score for score, _ in own),
        "norm": math.sqrt(sum(square for _, square in own)),
        "parameters": sum(t.parameter.numel() for t in place.trained.values()),
        "bytes": file_size(tensors),  # of a file that holds it alone: a little more than its share of a larger one
    }


# --- gradients ---


def _halves(session: Session, rows: int) -> list[list[Batch]]:
    """Micro-batches of `rows` rows, no row twice, dealt out to two halves; to one where there is no room for two.

    Each is a part of a micro-batch of the run itself, so that it needs no more than was planned.
    """
    job, corpus, size = session.job, session.corpus, session.settled.micro_batch
    steps = range(min(session.total, math.ceil(rows / job.batch)))
    groups = [part for step in steps for part in stepping.micro_rows(job, corpus, size, step)]
    # an epoch of few rows may end within these steps
    first = {row: group for group, part in reversed(list(enumerate(groups))) for row in part}
    every = [(group, row) for group, part in enumerate(groups) for row in part if first[row] == group]
    want = min(rows, len(every))
    taken = [every[n * len(every) // want] for n in range(want)]
    count = 2 if want > 1 and _room_for_two(session) else 1

    def made(half: int) -> Iterator[Batch]:
        for _, mine in itertools.groupby(taken[half::count], key=lambda one: one[0]):
            part, packed = [row for _, row in mine], job.kernels == "fast"
            yield stepping.batching.collate(corpus.train, part, packed=packed, pad_id=session.pad_id)

    return [list(made(half)) for half in range(count)]


def _room_for_two(session: Session) -> bool:
    """Whether a copy of the gradients fits: in the place of the optimiser's state, or in what the device has left."""
    plan = session.settled.plan
    state = plan.steady.get("optimizer", 0) - plan.paged_bytes
    copy = _COPY.itemsize * plan.trainable_params
    return copy <= max(state, session.device.usable_bytes - plan.needed_bytes)


def _rates(session: Session) -> dict[int, float]:
    """The highest rate of each trained parameter, by its id."""
    groups = assemble.optimiser_buckets(session.job, session.parts)
    return {id(p): group["lr"] for group in groups for bucket in group["params"] for p in bucket}


def _scores(
    work: Work, halves: Sequence[Sequence[Batch]], rates: Mapping[int, float], by_gradient: bool
) -> tuple[float, dict[int, tuple[float, float]]]:
    """(the mean loss, (score, square of the gradient's norm) of each trained parameter by its id)."""
    losses, first = [], {}
    for number, half in enumerate(halves):
        losses.append(float(accumulate(work, half)) / sum(batch.supervised for batch in half))
        if number + 1 < len(halves):
            first = {id(p): p.grad.to(_COPY) for p in work.trained if p.grad is not None}
            work.model.zero_grad(set_to_none=True)
    found = {}
    for parameter in work.trained:
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        parameter.grad = None
        other = first.get(id(parameter), grad if len(halves) == 1 else torch.zeros_like(grad))
        found[id(parameter)] = _fall(grad.float(), other.float(), rates[id(parameter)], by_gradient)
    loss = sum(losses) / len(losses)
    if not math.isfinite(loss + sum(square for _, square in found.values())):
        raise RunFailed(f"probing: loss {loss}, or a gradient: not finite")
    return loss, found


def _fall(one: torch.Tensor, other: torch.Tensor, rate: float, by_gradient: bool) -> tuple[float, float]:
    """(what a step by each half's gradient takes from the other's loss, the mean gradient's square)."""
    if by_gradient:
        fall = (one * other).sum()
    else:
        fall = ((one.sign() * other).sum() + (other.sign() * one).sum()) / 2
    return rate * float(fall), float(((one + other) / 2).square().sum())
