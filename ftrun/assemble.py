"""Job -> parts: the one place that knows the order.

    base -> skeleton -> anatomy -> rows -> weights -> method -> optimiser -> work

`sketch`, `attach` and `work` run the same way on meta, fake and real tensors: the plan is the run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftrun import early
from ftrun.beside import sweep
from ftrun.data import batches as batching
from ftrun.data.load import Corpus, load
from ftrun.data.template import adopt as adopt_template
from ftrun.errors import UserError
from ftrun.job import Job
from ftrun.memory.device import Device
from ftrun.memory.host import settle_maths
from ftrun.methods.files import load_adapter
from ftrun.models import provenance
from ftrun.models.base import Base, open_base
from ftrun.models.forward import PACKED, PLAIN, TokenLoss, register_attention
from ftrun.models.fuse import fuse
from ftrun.models.load import fill
from ftrun.models.prefix import Prefix
from ftrun.models.select import anatomy as find_anatomy
from ftrun.models.skeleton import check_length, skeleton
from ftrun.models.warm import Shelf
from ftrun.optim.gather import buckets, gather
from ftrun.optim.layout import Layout
from ftrun.optim.schedule import rate
from ftrun.runs import read_json
from ftrun.stepping import (
    first_groups,
)
from ftrun.train.kept import KeptRows, Store
from ftrun.train.loop import Work
from ftrun.train.parallel import Alone, Replicated, Sharded, mesh_of
from ftrun.train.ranks import Ranks
from ftrun.train.recompute import keep_all, recompute
from ftrun.values import Anatomy, Batch

Say = Callable[[str], None]


@dataclass
class Sketch:
    """A job's model before its weights: shapes, names, and the method that will tune it."""

    base: Base
    model: Any
    anatomy: Anatomy
    tuner: Any
    quantiser: Any
    drifts: list[str] = field(default_factory=list)  # in what the base is another than its adapter's, where allowed


def sketch(job: Job, cache: Path, say: Say, whole: bool = False, base: Base | None = None) -> Sketch:
    """The model's skeleton with its parts by role; whole: with the base's files at hand, whose config then rules.

    base: the job's, where it was opened before.

    Raises UserError where targets or layers match nothing, seq_len is beyond the model, or the base cannot be had.
    """
    sweep(cache)
    settle_maths()
    register_attention()
    base = base or open_base(job.model.typed(), base_name(job), cache, say)
    if whole:
        base.fetch()
    model = skeleton(base, attention=PACKED if job.kernels == "fast" else PLAIN)
    check_length(model, job.seq_len, say)
    method = job.method.typed()
    selected = find_anatomy(model, getattr(method, "targets", None) or "all", getattr(method, "layers", "all"))
    early.check_depth(job, selected.depth)
    quantiser = job.quant.load().Quantiser(job.quant.typed())
    return Sketch(base, model, selected, job.method.load().Tuner(method), quantiser)


def base_name(job: Job) -> str:
    """What the base is called: the choice, or the folder or hub id that the user gave in its place."""
    path = job.model.options.path
    if path is None:
        return job.model.choice
    folder = Path(path).expanduser()
    return folder.resolve().name if folder.is_dir() else str(path)


def rows(job: Job, parts: Sketch, cache: Path, say: Say) -> Corpus:
    """The job's rows, tokenised, with the method's virtual tokens counted in."""
    vocabulary = parts.model.get_input_embeddings().weight.shape[0]
    prefix = tuple(range(vocabulary, vocabulary + parts.tuner.prefix))
    tokenizer = parts.base.tokenizer()
    corpus = load(job.data.load(), job.data.typed(), tokenizer, job.seq_len, prefix, job.seed, cache, say)
    if len(tokenizer) > vocabulary:
        _check_ids(corpus, tokenizer, vocabulary, padded=job.kernels != "fast")
    return corpus


def _check_ids(corpus: Corpus, tokenizer: Any, vocabulary: int, padded: bool) -> None:
    """UserError where a row, or the padding, holds a token that the model has no embedding for."""
    known = f"the model's vocabulary ends at {vocabulary - 1}: tokenizer and model do not belong together"
    if padded and (tokenizer.pad_token_id or 0) >= vocabulary:
        raise UserError(f"the tokenizer pads with token {tokenizer.pad_token_id}; {known}")
    for rows in (corpus.train, corpus.held_out):
        for i in range(len(rows)):
            highest = int(rows.ids(i)[len(rows.prefix_ids) :].max())
            if highest >= vocabulary:
                shown = tokenizer.convert_ids_to_tokens(highest)
                raise UserError(f"{rows.where(i)}: found token {highest} ({shown!r}); {known}")


def furnish(
    job: Job,
    parts: Sketch,
    device: torch.device,
    cache: Path,
    say: Say,
    recomputed: int,
    shelf: Shelf | None = None,
    expects_scheme: bool = True,
) -> None:
    """Weights into the skeleton, then the method on top, drawn or read from `method.from`.

    shelf: keeps frozen weights for later jobs of this process; one that trains them itself takes none and leaves none.
    expects_scheme: whether the base of an adapter that is read must be stored here as it was there.
    """
    if shelf is not None and not parts.tuner.switchable:
        shelf.clear()
        shelf = None
    fill(parts.model, parts.base, parts.quantiser, device, cache, say, shelf)
    attach(job, parts)
    recompute_first(parts, recomputed)
    parts.tuner.initialise(parts.model, job.seed, parts.base.tokenizer())
    source = getattr(parts.tuner.options, "from_", None)
    if source:
        parts.drifts = adopt(job, parts, Path(source).expanduser(), say, expects_scheme)


def adopt(job: Job, parts: Sketch, folder: Path, say: Say, expects_scheme: bool = True) -> list[str]:
    """An adapter's values into the model, once it is seen to belong to this base; the drifts that the job allows.

    Raises UserError where it does not, unless the job has allow_drift, and where a tensor has no place.
    """
    config, tensors = load_adapter(folder)
    drifts = check_provenance(job, parts, folder, say, expects_scheme)
    parts.tuner.check(config)
    parts.tuner.load_state(parts.model, tensors)
    return drifts


def check_provenance(job: Job, parts: Sketch, folder: Path, say: Say, expects_scheme: bool = True) -> list[str]:
    """UserError, naming all that differs, where what lies in `folder` was trained on another base than the job's.

    Said aloud: a drift that the job allows, which is returned, and a folder that nothing is on record of.
    """
    # a run is recorded with the chat template of its data, which loading its rows sets
    adopt_template(parts.base.tokenizer(), getattr(job.data.options, "template", None), lambda text: None)
    recorded = read_json(folder / provenance.FILE)
    if recorded is None:
        say(f"warning: {folder}: holds no {provenance.FILE}: whether it belongs to this base cannot be told")
        return []
    try:
        found = provenance.drifts(recorded, provenance.record(parts.base, parts.quantiser.scheme()))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    found = [one for one in found if expects_scheme or one.what != "quantisation"]
    listed = "".join(f"\n  {one}" for one in found)
    if found and not job.allow_drift:
        raise UserError(
            f"{folder}: does not belong to the base at hand:{listed}\nallow_drift=true goes on all the same, and "
            "records it"
        )
    if found:
        say(f"warning: allow_drift=true: {folder} does not belong to the base at hand:{listed}")
    return [str(one) for one in found]


def attach(job: Job, parts: Sketch) -> None:
    """The method on the model, whether its tensors are real, fake or on meta."""
    if job.kernels == "fast":
        fuse(parts.model)
    parts.tuner.attach(parts.model, parts.anatomy, kernels=job.kernels)


def recompute_first(parts: Sketch, layers: int) -> None:
    """The first `layers` decoder layers that record a graph, and no others, are computed again in the backward pass."""
    every, below = decoder(parts), frozen_below(parts)
    keep_all(every)
    recompute(every[below : below + layers], preserve_rng=bool(getattr(parts.tuner.options, "dropout", 0.0)))


def frozen_below(parts: Sketch) -> int:
    """How many decoder layers lie below all that trains: no gradient reaches them, so that they record no graph.

    What trains outside the layers lies below them, but for a head of its own.
    """
    every = decoder(parts)
    places = {p: number for number in reversed(range(len(every))) for p in every[number].parameters()}
    embedded = set(parts.model.get_input_embeddings().parameters())
    head = [p for p in parts.model.get_output_embeddings().parameters() if p not in embedded]
    places |= dict.fromkeys(head, len(every))
    return min((places.get(p, 0) for p in parts.model.parameters() if p.requires_grad), default=len(every))


def prefix(parts: Sketch, loss: TokenLoss) -> Prefix:
    """The decoder layers that record no graph, to be run alone or passed by."""
    return Prefix(decoder(parts), frozen_below(parts), loss.hidden)


def decoder(parts: Sketch) -> list[nn.Module]:
    """The decoder's layers, in order."""
    return list(parts.model.get_submodule(stack_name(parts)))


def stack_name(parts: Sketch) -> str:
    """The dotted name of the list that holds the decoder's layers."""
    return parts.anatomy.blocks[0].name.rpartition(".")[0]


def kept_rows(
    job: Job, parts: Sketch, corpus: Corpus, micro_batch: int, pad_id: int, store: Store, to: Work, say: Say
) -> KeptRows:
    """What the frozen layers give the rows, kept in `store`. Raises ValueError where the model does not allow it."""

    def make(rows: Sequence[int]) -> Batch:
        return batching.collate(corpus.train, rows, packed=job.kernels == "fast", pad_id=pad_id)

    groups, loss = first_groups(job, corpus, micro_batch), TokenLoss(parts.model, job.kernels, job.loss_chunk)
    lengths = corpus.train.lengths
    return KeptRows(prefix(parts, loss), store, groups, lengths, make, to.device, say, to.autocast)


def work(
    job: Job,
    parts: Sketch,
    device: torch.device,
    total: int,
    loss: Callable[[Batch], torch.Tensor] | None = None,
    kind: str | None = None,
    parallel: Alone | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> Work:
    """What the loop works with; the caller adds the batches, the evaluations and the checkpoints.

    kind: the device type that the job is for, where its tensors lie on another (a plan's are fake ones on the CPU).
    parallel: how the model is shared by the ranks.
    """
    options, parallel = job.optim.typed(), parallel or Alone()
    groups, gathered = gather(optimiser_buckets(job, parts, parallel))
    home = "cpu" if parallel.offloads and not parts.tuner.switchable else kind or device.type
    optimiser = job.optim.load().build(groups, options, home)
    return Work(
        model=parts.model,
        loss=loss or TokenLoss(parts.model, job.kernels, job.loss_chunk),
        optimiser=optimiser,
        trained=[parallel.held(p) for found in parts.tuner.groups(parts.model).values() for p in found],
        gather_gradients=gathered.gather_gradients,
        holder=gathered.holder,
        rates=[g["lr"] for g in groups],
        schedule=lambda step: rate(step, total, options),
        total=total,
        device=device,
        clip=options.clip,
        foreach=True if (kind or device.type) == "cuda" else None,
        autocast=autocast(parts, device),
        ranks=ranks,
        parallel=parallel,
    )


def autocast(parts: Sketch, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """How the model runs: as it is, or, where it trains float32 masters of a bfloat16 base, under autocast."""
    low = parts.base.dtype == torch.bfloat16 and not parts.tuner.switchable and _trained_dtype(parts) == torch.float32
    # without its cache: that holds a copy of every weight to the end of the forward pass, for a second use of none
    return (
        functools.partial(torch.autocast, device.type, torch.bfloat16, cache_enabled=False)
        if low
        else contextlib.nullcontext
    )


def shared(job: Job, parts: Sketch, ranks: Ranks, strategy: str, kind: str, mesh: Any = None) -> Alone:
    """The model shared by the ranks. Its weights and what was learnt are in place; the optimiser is made after.

    strategy: "ddp" or "fsdp", settled. kind: the job's device type. mesh: the ranks', where it was made before.
    """
    if ranks.alone:
        return Alone()
    if strategy == "ddp":
        return Replicated(parts.model, ranks)
    # under method=full the weights themselves train: they are sharded with the rest
    whole = [p for p in parts.model.parameters() if p.requires_grad] if parts.tuner.switchable else []
    mesh = mesh or mesh_of(ranks)
    offload = job.offload and kind == "cuda"
    return Sharded(parts.model, decoder(parts), whole, mesh, ranks, offload, ahead=kind == "cuda")


def optimiser_buckets(job: Job, parts: Sketch, parallel: Alone | None = None) -> list[dict[str, Any]]:
    """The optimiser's groups, "params" being lists: the parameters of a list are one tensor to the optimiser.

    Where it gathers, those of one decoder layer are (so that equal layers stay equal), and those outside the layers.
    """
    options = job.optim.typed()
    groups = _groups(job, parts, options)
    parallel = parallel or Alone()
    if not options.gathers_below or not parallel.gathers:
        return [{**group, "params": [[parallel.held(p)] for p in group["params"]]} for group in groups]
    layers: dict[torch.Tensor, Hashable] = {p: n for n, each in enumerate(decoder(parts)) for p in each.parameters()}
    return buckets(groups, layers.get, options.gathers_below)


def layouts(job: Job, parts: Sketch) -> tuple[Layout, Layout]:
    """How optimisers hold what trains: one process's, and one of the very parameters, where nothing is gathered."""
    every = [p for found in parts.tuner.groups(parts.model).values() for p in found]
    numbers, apart = {p: n for n, p in enumerate(every)}, Alone()
    apart.gathers = False
    return (
        Layout.of(optimiser_buckets(job, parts), numbers),
        Layout.of(optimiser_buckets(job, parts, apart), numbers),
    )


def _groups(job: Job, parts: Sketch, options: Any) -> list[dict[str, Any]]:
    """The trained parameters with their rates: B's may be another (LoRA+), vectors and magnitudes do not decay."""
    found = parts.tuner.groups(parts.model)
    if options.lora_plus != 1 and "B" not in found:
        raise UserError(
            f"optim.lora_plus={options.lora_plus:g}: method={job.method.choice} has no matrix B to speed up"
        )
    return [
        {
            "params": parameters,
            "lr": job.lr * (options.lora_plus if name == "B" else 1.0),
            "weight_decay": 0.0 if name in ("vectors", "magnitude") else options.weight_decay,
        }
        for name, parameters in found.items()
    ]


def _trained_dtype(parts: Sketch) -> torch.dtype:
    return next(p.dtype for p in parts.model.parameters() if p.requires_grad)


def counts(parts: Sketch) -> tuple[int, int]:
    """(parameters of the base and the method, those that train); quantised weights by the shape they stand for."""
    seen: dict[int, int] = {}
    trained = 0
    for parameter in parts.model.parameters():
        if id(parameter) not in seen:
            seen[id(parameter)] = parameter.numel()
            trained += parameter.numel() if parameter.requires_grad else 0
    stored = sum(math.prod(m.shape) for m in parts.model.modules() if hasattr(m, "parts"))
    return sum(seen.values()) + stored, trained


def torch_device(device: Device) -> torch.device:
    """Where this process's tensors live: Accelerate knows its process and device."""
    from accelerate import PartialState

    return PartialState(cpu=device.type == "cpu").device


def filled_on(device: torch.device, strategy: str) -> torch.device:
    """Where the weights are read to. What is sharded goes from the host to the device layer by layer, each rank's part
    alone staying there: whole it may not fit."""
    return torch.device("cpu") if strategy == "fsdp" else device


def saved_config(parts: Sketch) -> Any:
    """The base's own config for a saved model: the skeleton's has dropout and cache taken out."""
    config = copy.deepcopy(parts.base.config)
    config.get_text_config().vocab_size = parts.base.rows
    config.dtype = _trained_dtype(parts)
    config.architectures = [type(parts.model).__name__]
    return config
