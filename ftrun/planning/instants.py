"""The names of a step's parts: each layer's forward and backward pass, the loss and its backward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ftrun import assemble
from ftrun.job import Job
from ftrun.memory.track import BACKWARD, FORWARD, Instant, Tracker
from ftrun.models.forward import TokenLoss
from ftrun.models.prefix import Pass, Prefix
from ftrun.values import Batch

ABOVE = "kept outputs"


class NamedLoss(TokenLoss):
    """Names the loss's part of a step, and books what it makes as logits.

    prefix: the layers whose outputs are kept, if any: each batch then runs them first, as the first epoch does, and
    begins above them. output_bytes: what they give one token.
    """

    def __init__(self, model: Any, job: Job, tracker: Tracker) -> None:
        super().__init__(model, job.kernels, job.loss_chunk)
        self.tracker, self.part = tracker, -1
        self.prefix: Prefix | None = None
        self.output_bytes = 0

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.part += 1
        self.tracker.part = self.part
        if self.part:
            self.tracker.begin(Instant("embeddings", self.part))
        with nullcontext() if self.prefix is None else self.prefix.passed([self._take(self.prefix, batch)]):
            loss = super().__call__(batch)
        loss.register_hook(self._backward)
        return loss

    def _take(self, prefix: Prefix, batch: Batch) -> torch.Tensor:
        """As KeptRows does: the outputs go to where they are kept, and come back."""
        hidden = prefix.outputs(batch)
        shape, dtype = hidden.shape, hidden.dtype
        self.output_bytes = shape[-1] * dtype.itemsize
        del hidden
        self.tracker.begin(Instant(ABOVE, self.part))
        return torch.zeros(shape, dtype=dtype)

    def score(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        if self.fast:
            self.tracker.begin(Instant("loss", self.part))
        with self.tracker.role("logits"):
            return super().score(outputs, batch)

    def _backward(self, gradient: torch.Tensor) -> None:
        self.tracker.begin(Instant("backward of the loss", self.part))
        self.tracker.default_role = "logits"


@contextmanager
def named(parts: assemble.Sketch, tracker: Tracker) -> Iterator[None]:
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
        if not isinstance(module.forward, Pass):
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
