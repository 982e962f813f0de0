"""The job's model on fake tensors: the job's own assembly, of whose equal layers only a few are run."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ftrun import assemble
from ftrun.job import Job
from ftrun.memory import stack
from ftrun.memory.track import BACKWARD, FORWARD, Instant, Moment, Segment, Tracker
from ftrun.methods.base import Wrapper
from ftrun.methods.files import file_size
from ftrun.models.forward import TokenLoss
from ftrun.models.load import prepare
from ftrun.optim.paging import paged_bytes
from ftrun.train.loop import Work, accumulate, clip, clip_gradients, update
from ftrun.values import Batch

CUDA_BLOCK = 512  # bytes: PyTorch's caching allocator rounds every block up to this
CLIPPING, OPTIMISER = "clipping", "optimiser step"
# attributes of a module that differ from layer to layer and decide nothing: its place, a wrapper's names
_PLACES = ("layer_idx", "layer_id", "layer_index", "name", "filed")


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


@dataclasses.dataclass(frozen=True)
class _Few:
    """A step with few layers, which are known by their places among them, and what each layer holds throughout."""

    lived: Lived
    held: list[Moment]
    paged: list[int]


class Twin:
    """A sketch once more on fake tensors, its method attached. Nothing of the model's size is allocated.

    device_type: "cpu" or "cuda", what the job is planned for. whole: run every layer, for those who doubt.
    """

    def __init__(self, job: Job, parts: assemble.Sketch, device_type: str, whole: bool = False) -> None:
        self.job, self.device_type, self.whole = job, device_type, whole
        model = copy.deepcopy(parts.model)
        prepare(model, parts.quantiser, parts.base)
        self.parts = dataclasses.replace(parts, model=model, tuner=type(parts.tuner)(parts.tuner.options))
        assemble.attach(job, self.parts)
        self.total, self.trained = assemble.counts(self.parts)
        self.file_bytes = file_size(self.parts.tuner.state(model))
        self.layers = assemble.decoder(self.parts)
        self.signatures = [_signature(layer) for layer in self.layers]
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._made: dict[int, Any] = {}
        self._known: dict[Any, _Few] = {}
        self._ends: tuple[Sequence[stack.Run], dict[str, Moment]] | None = None

    @property
    def depth(self) -> int:
        """Decoder layers in all."""
        return len(self.layers)

    def step(self, micro_batches: Sequence[Batch], recomputed: int) -> Lived:
        """One optimiser step over `micro_batches` (real, on the CPU), the optimiser's state in place.

        recomputed: how many of the first decoder layers are computed again in the backward pass.
        """
        flags = [index < recomputed for index in range(len(self.layers))]
        kinds = list(zip(self.signatures, flags, strict=True))
        runs = [stack.Run(n, 1, 1) for n in range(len(kinds))] if self.whole else stack.runs(kinds)
        layers = [layer for run in runs for layer in run.layers()]
        few = self._run(tuple(kinds[i] for i in layers), layers, micro_batches)
        place = {layer: n for n, layer in enumerate(layers)}
        middle = {r: [place[r.layer(r.low, i)] for i in range(r.period)] for r in runs if r.left_out}
        held = {run: _sum(few.held[n] for n in places) for run, places in middle.items()}
        numbered = [dataclasses.replace(s, instant=s.instant.renumbered(layers)) for s in few.lived.segments]
        segments = stack.extend(runs, numbered, held)
        if held:
            self._extend_end(segments, runs)
        paged = sum(run.left_out * sum(few.paged[n] for n in places) for run, places in middle.items())
        return Lived(segments, stack.grown(few.lived.steady, held), few.lived.paged + paged)

    def _run(self, kinds: tuple[Any, ...], layers: Sequence[int], micro_batches: Sequence[Batch]) -> _Few:
        """The step with these layers alone. What equals an earlier one but for its layers' numbers is not run again."""
        key = (kinds, tuple(_shape(batch) for batch in micro_batches))
        if key not in self._known:
            with _only(self.parts, self.layers, layers):
                assemble.recompute_first(self.parts, sum(recomputed for _, recomputed in kinds))
                with self._at_work() as (tracker, work):
                    fakes = [batch.each(self.mode.from_tensor) for batch in micro_batches]
                    self._known[key] = self._take(tracker, work, fakes)
        return self._known[key]

    @contextmanager
    def _at_work(self) -> Iterator[tuple[Tracker, Work]]:
        """The model as it stands on fake tensors, followed, between two steps."""
        with self.mode:
            _to_fake(self.parts.model, self._made)
            tracker = Tracker(CUDA_BLOCK if self.device_type == "cuda" else 1)
            loss = _Watched(self.parts.model, self.job.kernels, tracker)
            work = assemble.work(self.job, self.parts, torch.device("cpu"), total=2, loss=loss, kind=self.device_type)
            with tracker:
                _mark(tracker, self.parts)
                _make_state(work)
                work.gather_gradients = tracker.role("gradients")(work.gather_gradients)
                for tensor in _optimiser_state(work.optimiser):
                    tracker.mark([tensor], "optimizer" if tensor.numel() > 1 else "other")  # counters of steps
                tracker.forget()
                yield tracker, work

    def _take(self, tracker: Tracker, work: Work, fakes: list[Batch]) -> _Few:
        """The step itself."""
        for batch in fakes:
            tracker.mark([batch.input_ids, batch.position_ids, batch.targets], "batch")
        with _named(self.parts, tracker):
            tracker.begin(Instant("embeddings"))
            accumulate(work, fakes)
        tracker.default_role = "activations"
        _end(tracker, work)
        held, paged = _each_holds(tracker, work, assemble.decoder(self.parts))
        return _Few(Lived(tracker.segments, tracker.now.copy(), paged_bytes(work.optimiser)), held, paged)

    def _extend_end(self, segments: list[Segment], runs: Sequence[stack.Run]) -> None:
        """The peaks of clipping and of the optimiser's step: what they take for a while depends on all the weights.

        Clipping makes one list of all norms, whose rounding no layer's share tells: all gradients are clipped. What
        the optimiser takes grows evenly with each run's layers.
        """
        if self._ends is None or self._ends[0] != runs:
            few = next(s.peak.less(s.start) for s in segments if s.instant.name == OPTIMISER)
            update = few
            for run in (run for run in runs if run.left_out):
                layers = [layer for r in runs for layer in r.layers(more=int(r is run))]
                update = update.plus(self._update_alone(layers).less(few), run.left_out)
            self._ends = runs, {CLIPPING: self._clipping(), OPTIMISER: update}
        for segment in segments:
            if segment.instant.name in self._ends[1]:
                segment.peak = segment.start.plus(self._ends[1][segment.instant.name])

    def _update_alone(self, layers: Sequence[int]) -> Moment:
        """What the optimiser's step adds at its peak, with these layers alone."""
        with _only(self.parts, self.layers, layers), self._at_work() as (tracker, work):
            for parameter in work.trained:
                parameter.grad = torch.zeros_like(parameter)
                tracker.mark([parameter.grad], "gradients")
            tracker.begin(Instant(OPTIMISER))
            update(work)
            return tracker.segments[-1].peak.less(tracker.segments[-1].start)

    def _clipping(self) -> Moment:
        """What clipping the gradients of all layers adds at its peak."""
        with self.mode:
            found = [p for group in self.parts.tuner.groups(self.parts.model).values() for p in group]
            trained = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in found]
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            tracker = Tracker(CUDA_BLOCK if self.device_type == "cuda" else 1)
            with tracker:
                tracker.mark([p.grad for p in trained if p.grad is not None], "gradients")
                tracker.begin(Instant(CLIPPING))
                clip_gradients(trained, self.job.optim.options.clip)
            return tracker.segments[-1].peak.less(tracker.segments[-1].start)


def _end(tracker: Tracker, work: Work) -> None:
    """What follows the last backward pass of a step."""
    tracker.begin(Instant(CLIPPING))
    clip(work)
    tracker.begin(Instant(OPTIMISER))
    update(work)


def _each_holds(tracker: Tracker, work: Work, layers: Sequence[nn.Module]) -> tuple[list[Moment], list[int]]:
    """What each layer holds between steps and no other does, and the part of it that can page."""
    tensors = [list(_residents(layer, work)) for layer in layers]
    seen = Counter(key for found in tensors for key in {t.untyped_storage()._cdata for t in found})
    held = [tracker.held(t for t in found if seen[t.untyped_storage()._cdata] == 1) for found in tensors]
    holders = [{work.holder(parameter) for parameter in layer.parameters()} for layer in layers]
    return held, [paged_bytes(work.optimiser, own) for own in holders]


def _residents(layer: nn.Module, work: Work) -> Iterator[torch.Tensor]:
    yield from layer.buffers()
    for parameter in layer.parameters():
        yield parameter
        state = work.optimiser.state.get(work.holder(parameter), {})
        yield from (v for v in state.values() if isinstance(v, torch.Tensor))


def _sum(moments: Iterable[Moment]) -> Moment:
    found = Moment()
    for moment in moments:
        found = found.plus(moment)
    return found


class _Watched(TokenLoss):
    """Names the loss's part of a step, and books what it makes as logits."""

    def __init__(self, model: Any, kernels: str, tracker: Tracker) -> None:
        super().__init__(model, kernels)
        self.tracker, self.part = tracker, -1

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.part += 1
        self.tracker.part = self.part
        if self.part:
            self.tracker.begin(Instant("embeddings", self.part))
        loss = super().__call__(batch)
        loss.register_hook(self._backward)
        return loss

    def score(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        if self.fast:
            self.tracker.begin(Instant("loss", self.part))
        with self.tracker.role("logits"):
            return super().score(outputs, batch)

    def _backward(self, gradient: torch.Tensor) -> None:
        self.tracker.begin(Instant("backward of the loss", self.part))
        self.tracker.default_role = "logits"


@contextmanager
def _named(parts: assemble.Sketch, tracker: Tracker) -> Iterator[None]:
    """Each decoder layer's forward and backward pass are segments of their own; the head's product is the loss's."""
    handles = []
    for number, layer in enumerate(assemble.decoder(parts)):
        handles.append(layer.register_forward_pre_hook(_entering(tracker, number)))
        handles.append(layer.register_forward_hook(_left(tracker, number)))
    for parameter in parts.model.parameters():
        if parameter.requires_grad:
            booked = parameter.register_post_accumulate_grad_hook(lambda p: tracker.mark([p.grad], "gradients"))
            handles.append(booked)
    head = parts.model.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(_scoring(tracker)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(tracker: Tracker, number: int) -> Any:
    def enter(module: nn.Module, arguments: Any) -> None:
        tracker.begin(Instant(FORWARD, tracker.part, number))

    return enter


def _left(tracker: Tracker, number: int) -> Any:
    def back(gradient: torch.Tensor, part: int) -> None:
        tracker.default_role = "activations"
        tracker.begin(Instant(BACKWARD, part, number))

    def leave(module: nn.Module, arguments: Any, out: Any) -> None:
        hidden = out if isinstance(out, torch.Tensor) else out[0]
        if hidden.requires_grad:
            hidden.register_hook(functools.partial(back, part=tracker.part))

    return leave


def _scoring(tracker: Tracker) -> Any:
    def enter(module: nn.Module, arguments: Any) -> None:
        # the fast loss has named its part already, chunk by chunk
        if tracker.segments[-1].instant.name == FORWARD:
            tracker.begin(Instant("loss", tracker.part))
            tracker.default_role = "logits"

    return enter


@contextmanager
def _only(parts: assemble.Sketch, layers: Sequence[nn.Module], kept: Sequence[int]) -> Iterator[None]:
    """The model with `kept` of its decoder's layers alone."""
    name, config = assemble.stack_name(parts), parts.model.config.get_text_config()
    before = {"num_hidden_layers": config.num_hidden_layers}
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        before["layer_types"] = kinds
    try:
        parts.model.set_submodule(name, nn.ModuleList(layers[i] for i in kept))
        config.num_hidden_layers = len(kept)
        if kinds is not None:
            config.layer_types = [kinds[i] for i in kept]
        yield
    finally:
        parts.model.set_submodule(name, nn.ModuleList(layers))
        for key, value in before.items():
            setattr(config, key, value)


def _signature(layer: nn.Module) -> Hashable:
    """All that decides what a layer allocates: its modules' kinds, sizes and plain attributes."""
    return tuple(
        (name, type(module).__qualname__, _tensors(module._parameters), _tensors(module._buffers), _plain(module))
        for name, module in layer.named_modules()
    )


def _tensors(held: dict[str, torch.Tensor | None]) -> Hashable:
    return tuple((n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in held.items() if t is not None)


def _plain(module: nn.Module) -> Hashable:
    kinds = (bool, int, float, str, tuple, type(None))
    found = {k: v for k, v in vars(module).items() if isinstance(v, kinds) and k not in _PLACES}
    return tuple((k, repr(v)) for k, v in sorted(found.items()))


def _shape(batch: Batch) -> Hashable:
    learnt = 0 if batch.learnt is None else batch.learnt.numel()
    return tuple(batch.input_ids.shape), batch.lengths, batch.packed, learnt


def _flat(kept: list[list[int]]) -> list[int]:
    return [layer for layers in kept for layer in layers]


def _to_fake(model: nn.Module, made: dict[int, Any]) -> None:
    """Meta tensors become fake CPU tensors; a tied weight stays one. made: by the meta tensor, for the next time."""
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None and old.is_meta:
                module._parameters[name] = made.setdefault(
                    id(old), (old, nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad))
                )[1]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


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
