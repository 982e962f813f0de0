"""The job's model on fake tensors: the job's own assembly, of whose equal layers only a few are run."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ftrun import assemble
from ftrun.job import Job
from ftrun.kernels import compiled
from ftrun.memory import cpu_kernels, cuda, stack
from ftrun.memory.cost import Cost
from ftrun.memory.device import Device, Options, resolve
from ftrun.memory.pool import BLOCK
from ftrun.memory.track import Instant, Moment, Segment, Tracker, own
from ftrun.methods.base import Wrapper
from ftrun.methods.files import file_size
from ftrun.models.load import prepare
from ftrun.optim.paging import paged_bytes
from ftrun.planning import sharing
from ftrun.planning.instants import NamedLoss, named
from ftrun.planning.layers import only, shape_of, signature, to_fake, to_real
from ftrun.train.loop import Work, accumulate, clip, clip_gradients, update
from ftrun.train.parallel import Alone
from ftrun.values import Batch

CLIPPING, OPTIMISER = "clipping", "optimiser step"


@dataclasses.dataclass(frozen=True)
class Lived:
    """What a step took: its segments in order, what lives between steps, and of the optimiser's state what can page."""

    segments: list[Segment]
    steady: Moment
    paged: int

    @property
    def peak(self) -> Segment:
        """The segment with the highest moment, the first of equals."""
        return max(self.segments, key=lambda segment: segment.peak.total)

    def beside(self, size: int) -> Lived:
        """The same step where so many other bytes are taken throughout."""
        if not size:
            return self
        more = Moment()
        more.total = more.by_role["other"] = size
        raised = [dataclasses.replace(s, start=s.start.plus(more), peak=s.peak.plus(more)) for s in self.segments]
        return Lived(raised, self.steady.plus(more), self.paged)

    @property
    def host(self) -> int:
        """Bytes in the host's memory at most, for a device that is not the host."""
        return max(moment.host for segment in self.segments for moment in (segment.start, segment.peak))

    @property
    def cost(self) -> Cost:
        """The work of the whole step, where it was counted."""
        return functools.reduce(Cost.plus, (segment.cost for segment in self.segments), Cost())


@dataclasses.dataclass(frozen=True)
class _Few:
    """A step with few layers, which are known by their places among them, and what each layer holds throughout."""

    lived: Lived
    held: list[Moment]
    paged: list[int]


class Twin:
    """A sketch once more on fake tensors, its method attached. Nothing of the model's size is allocated.

    device: what the job is planned for (None: the CPU). whole: run every layer, for those who doubt.
    counts: also count the work of a step. strategy: "ddp" or "fsdp", how the job's devices share where it has several:
    the plan is then that of the first, which is the fullest.
    """

    def __init__(
        self,
        job: Job,
        parts: assemble.Sketch,
        device: Device | None = None,
        whole: bool = False,
        counts: bool = False,
        strategy: str = "ddp",
    ) -> None:
        self.job, self.device, self.whole, self.counts = job, device or resolve(Options(type="cpu")), whole, counts
        self.strategy = strategy if job.devices > 1 else ""
        model = copy.deepcopy(parts.model)
        prepare(model, parts.quantiser, parts.base)
        self.parts = dataclasses.replace(parts, model=model, tuner=type(parts.tuner)(parts.tuner.options))
        assemble.attach(job, self.parts)
        self.total, self.trained = assemble.counts(self.parts)
        self.file_bytes = file_size(self.parts.tuner.state(model))
        self.layers = assemble.decoder(self.parts)
        self.below = assemble.frozen_below(self.parts)  # layers that record no graph
        self.signatures = [signature(layer) for layer in self.layers]
        self.output_bytes = 0  # what the layers below all that trains give a token, once a step has kept it
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._made: dict[int, Any] = {}
        self._known: dict[Any, _Few] = {}
        self._lived: dict[Any, Lived] = {}
        self._ends: dict[str, Moment] = {}  # what clipping and the optimiser's step add at their peaks

    @property
    def depth(self) -> int:
        """Decoder layers in all."""
        return len(self.layers)

    @property
    def graphs(self) -> int:
        """Decoder layers that record a graph: those that can be computed again in the backward pass."""
        return self.depth - self.below

    def trained_layers(self) -> list[int]:
        """The decoder layers in which something trains."""
        return [number for number, layer in enumerate(self.layers) if _trained(layer)]

    def step(self, micro_batches: Sequence[Batch], recomputed: int, keeps: bool = False) -> Lived:
        """One optimiser step over `micro_batches` (real, on the CPU), the optimiser's state in place.

        recomputed: how many decoder layers are computed again in the backward pass, from the lowest trained one on.
        keeps: the outputs of the layers below that one are kept: they run alone, and the step begins above them.
        """
        key = (recomputed, keeps, tuple(shape_of(batch) for batch in micro_batches))
        if key not in self._lived:
            self._lived[key] = self._step(micro_batches, recomputed, keeps)
        return self._lived[key]

    def _step(self, micro_batches: Sequence[Batch], recomputed: int, keeps: bool) -> Lived:
        every = range(len(self.layers))
        flags = [(0 <= index - self.below < recomputed, keeps and index < self.below) for index in every]
        kinds = [(own, *flag) for own, flag in zip(self.signatures, flags, strict=True)]
        runs = [stack.Run(n, 1, 1) for n in range(len(kinds))] if self.whole else stack.runs(kinds)
        layers = [layer for run in runs for layer in run.layers()]
        few = self._run(tuple(kinds[i] for i in layers), layers, micro_batches)
        place = {layer: n for n, layer in enumerate(layers)}
        middle = {r: [place[r.layer(r.low, i)] for i in range(r.period)] for r in runs if r.left_out}
        held = {run: _sum(few.held[n] for n in places) for run, places in middle.items()}
        numbered = [dataclasses.replace(s, instant=s.instant.renumbered(layers)) for s in few.lived.segments]
        if not stack.even(runs, numbered):
            self.whole = True  # something is kept and let go outside the layers: no layer's share tells
            return self._step(micro_batches, recomputed, keeps)
        segments = stack.extend(runs, numbered, held)
        if held:
            self._extend_end(segments, layers, few.lived.segments[-2:])
        paged = sum(run.left_out * sum(few.paged[n] for n in places) for run, places in middle.items())
        return Lived(segments, stack.grown(few.lived.steady, held), few.lived.paged + paged)

    def alone(self, layers: Sequence[int], micro_batches: Sequence[Batch], recomputed: int) -> Cost:
        """The work of a step with these layers alone, the first `recomputed` of them computed again."""
        kinds = tuple((self.signatures[i], n < recomputed, False) for n, i in enumerate(layers))
        return self._run(kinds, layers, micro_batches).lived.cost

    @contextmanager
    def real(self, layers: Sequence[int], recomputed: int, device: torch.device) -> Iterator[Work]:
        """The same model with these layers alone, on real tensors of random values: to measure how fast a step is.

        A twin that is real once does not plan any more.
        """
        with only(self.parts, self.layers, layers):
            assemble.recompute_first(self.parts, recomputed)
            to_real(self.parts.model, device)
            yield assemble.work(self.job, self.parts, device, total=2)

    def _run(self, kinds: tuple[Any, ...], layers: Sequence[int], micro_batches: Sequence[Batch]) -> _Few:
        """The step with these layers alone. What equals an earlier one but for its layers' numbers is not run again."""
        key = (kinds, tuple(shape_of(batch) for batch in micro_batches))
        if key not in self._known:
            with only(self.parts, self.layers, layers), self._fresh() as parts:
                assemble.recompute_first(parts, sum(recomputed for _, recomputed, _ in kinds))
                with self._at_work(parts, keeps=any(alone for *_, alone in kinds)) as (tracker, work):
                    fakes = [batch.each(self.mode.from_tensor) for batch in micro_batches]
                    self._known[key] = self._take(parts, tracker, work, fakes)
        return self._known[key]

    @contextmanager
    def _fresh(self) -> Iterator[assemble.Sketch]:
        """The model as it stands; where torch changes it for good to share it out, a copy."""
        if self.strategy != "fsdp":
            yield self.parts
            return
        model = copy.deepcopy(self.parts.model)
        tuner = type(self.parts.tuner)(self.parts.tuner.options)
        yield dataclasses.replace(self.parts, model=model, tuner=tuner)

    @contextmanager
    def _shared(self, parts: assemble.Sketch, tracker: Tracker) -> Iterator[Alone]:
        """How the ranks share the model, under fake tensors."""
        if not self.strategy:
            yield Alone()
        elif self.strategy == "ddp":
            trained = [p for found in parts.tuner.groups(parts.model).values() for p in found]
            buckets = sharing.Buckets(trained, self.job.devices, tracker)
            yield buckets
            buckets.end()
        else:
            with sharing.pretended(self.job.devices) as (ranks, mesh), self.mode:
                yield assemble.shared(self.job, parts, ranks, "fsdp", self.device.type, mesh)

    @contextmanager
    def _at_work(self, parts: assemble.Sketch, keeps: bool = False) -> Iterator[tuple[Tracker, Work]]:
        """The model as it stands on fake tensors, followed, between two steps."""
        tracker = self._tracker(self.counts)
        with self.mode:
            to_fake(parts.model, self._made if parts is self.parts else {})
        with self._shared(parts, tracker) as parallel, self.mode, sharing.resizing(tracker.resized):
            parts.model.train()  # as the loop does: dropout draws masks
            loss = NamedLoss(parts.model, self.job, tracker)
            loss.prefix = assemble.prefix(parts, loss) if keeps else None
            work = assemble.work(
                self.job, parts, torch.device("cpu"), total=2, loss=loss, kind=self.device.type, parallel=parallel
            )
            with tracker, self._operators(), sharing.offloading(tracker):
                _mark(tracker, parts)
                if parallel.offloads:
                    tracker.to_host(p for p in parts.model.parameters() if hasattr(p, "to_local"))
                self._workspaces(tracker)
                if isinstance(parallel, sharing.Buckets):
                    parallel.begin()
                _make_state(work)
                work.gather_gradients = tracker.role("gradients")(work.gather_gradients)
                for tensor in _optimiser_state(work.optimiser):
                    tracker.mark([tensor], "optimizer" if tensor.numel() > 1 else "other")  # counters of steps
                tracker.forget()
                yield tracker, work
            self.output_bytes = loss.output_bytes or self.output_bytes

    @contextmanager
    def _operators(self) -> Iterator[None]:
        """The operators that the device takes, where they are not the CPU's."""
        own = cuda.CudaOps(self.device.capability) if self.device.type == "cuda" else nullcontext()
        with compiled.planned_for(self.device.type), own:
            yield

    def _workspaces(self, tracker: Tracker) -> None:
        """What CUDA's libraries keep for themselves: each of the two threads that multiply has its own."""
        if self.device.type == "cuda":
            for size in cuda.workspaces(self.device.capability):
                tracker.hold(size)
                tracker.hold(size)

    def _tracker(self, counts: bool = False) -> Tracker:
        if self.device.type == "cuda":
            return Tracker(BLOCK, cuda.transient, counts=counts)
        return Tracker(transient=cpu_kernels.transient, counts=counts)

    def _take(self, parts: assemble.Sketch, tracker: Tracker, work: Work, fakes: list[Batch]) -> _Few:
        """The step itself."""
        for batch in fakes:
            tracker.mark([batch.input_ids, batch.position_ids, batch.targets], "batch")
        with named(parts, tracker):
            tracker.begin(Instant("embeddings"))
            accumulate(work, fakes)
        tracker.default_role = "activations"
        _end(tracker, work)
        held, paged = _each_holds(tracker, work, assemble.decoder(parts))
        return _Few(Lived(tracker.segments, tracker.now.copy(), paged_bytes(work.optimiser)), held, paged)

    def _extend_end(self, segments: list[Segment], kept: Sequence[int], ends: Sequence[Segment]) -> None:
        """The peaks of clipping and of the optimiser's step, and their work: they hang on all the weights that train.

        ends: these two segments of the step with the `kept` layers alone.
        """
        if not self._ends:
            self._ends = self._all_ends(kept, ends)
        there = self.trained - sum(_trained(layer) for n, layer in enumerate(self.layers) if n not in kept)
        for segment in segments:
            if segment.instant.name in self._ends:
                segment.cost = Cost().plus(segment.cost, self.trained / there)
                segment.peak = segment.start.plus(self._ends[segment.instant.name])

    def _all_ends(self, kept: Sequence[int], ends: Sequence[Segment]) -> dict[str, Moment]:
        """What the ends of a step add at their peaks: that grows evenly with each run's layers."""
        runs = stack.runs(self.signatures)
        layers = [layer for run in runs for layer in run.layers()]
        few = _added(ends) if list(kept) == layers else self._ends_alone(layers)
        found = dict(few)
        for run in (run for run in runs if run.left_out):
            more = self._ends_alone([layer for r in runs for layer in r.layers(more=int(r is run))])
            found = {name: moment.plus(more[name].less(few[name]), run.left_out) for name, moment in found.items()}
        return {**found, CLIPPING: self._clipping()} if self.device.type == "cuda" else found

    def _ends_alone(self, layers: Sequence[int]) -> dict[str, Moment]:
        """What the ends of a step with these layers alone add at their peaks."""
        with only(self.parts, self.layers, layers), self._fresh() as parts, self._at_work(parts) as (tracker, work):
            for parameter in work.trained:
                parameter.grad = torch.zeros_like(parameter)
                tracker.mark([parameter.grad], "gradients")
            _end(tracker, work)
            return _added(tracker.segments[-2:])

    def _clipping(self) -> Moment:
        """What clipping adds at its peak on CUDA: all norms in one block, whose rounding no layer's share tells.

        It takes nothing of a gradient's size, so that small ones stand for all, and they may as well be real.
        """
        trained = [p.dtype for group in self.parts.tuner.groups(self.parts.model).values() for p in group]
        small = {dtype: nn.Parameter(torch.zeros(1, dtype=dtype)) for dtype in trained}
        for parameter in small.values():
            parameter.grad = torch.zeros_like(parameter)
        tracker = self._tracker()
        with tracker:
            tracker.mark([p.grad for p in small.values() if p.grad is not None], "gradients")
            tracker.begin(Instant(CLIPPING))
            clip_gradients([small[dtype] for dtype in trained], self.job.optim.options.clip, foreach=True)
        return tracker.segments[-1].peak.less(tracker.segments[-1].start)


def _added(segments: Sequence[Segment]) -> dict[str, Moment]:
    """What each segment adds, at its peak, to what was live as it began."""
    return {segment.instant.name: segment.peak.less(segment.start) for segment in segments}


def _end(tracker: Tracker, work: Work) -> None:
    """What follows the last backward pass of a step."""
    tracker.begin(Instant(CLIPPING))
    clip(work)
    tracker.begin(Instant(OPTIMISER))
    update(work)


def _each_holds(tracker: Tracker, work: Work, layers: Sequence[nn.Module]) -> tuple[list[Moment], list[int]]:
    """What each layer holds between steps and no other does, and the part of it that can page."""
    tensors = [list(_residents(layer, work)) for layer in layers]
    seen = Counter(key for found in tensors for key in {own(t).untyped_storage()._cdata for t in found})
    held = [tracker.held(t for t in found if seen[own(t).untyped_storage()._cdata] == 1) for found in tensors]
    holders = [{work.holder(parameter) for parameter in layer.parameters()} for layer in layers]
    return held, [paged_bytes(work.optimiser, own) for own in holders]


def _trained(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)


def _residents(layer: nn.Module, work: Work) -> Iterator[torch.Tensor]:
    yield from layer.buffers()
    for parameter in layer.parameters():
        yield parameter
        yield from work.parallel.places(parameter)
        state = work.optimiser.state.get(work.holder(work.parallel.held(parameter)), {})
        yield from (v for v in state.values() if isinstance(v, torch.Tensor))


def _sum(moments: Iterable[Moment]) -> Moment:
    found = Moment()
    for moment in moments:
        found = found.plus(moment)
    return found


def _flat(kept: list[list[int]]) -> list[int]:
    return [layer for layers in kept for layer in layers]


def _mark(tracker: Tracker, parts: assemble.Sketch) -> None:
    """Book what is there before a step: weights as they are stored, what trains, and what a module merely keeps."""
    trained = "adapters" if parts.tuner.switchable else "weights"
    for module in parts.model.modules():
        if hasattr(module, "parts"):
            for role, tensors in module.parts().items():
                tracker.mark(tensors, role)
        else:
            kept = "adapters" if isinstance(module, Wrapper) else "other"  # rotary frequencies are no weights
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    tracker.mark([buffer], kept if name in module._non_persistent_buffers_set else "weights")
    for parameter in parts.model.parameters():
        tracker.mark([parameter], trained if parameter.requires_grad else "weights")


def _make_state(work: Work) -> None:
    """The optimiser's state as after a first step, without the step: gradients of nothing are enough to make it."""
    for group in work.optimiser.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    update(work)


def _optimiser_state(optimiser: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [v for state in optimiser.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
