"""A model with a few of its decoder's layers alone, its tensors on meta, fake, or real and random."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ftrun import assemble
from ftrun.values import Batch

# attributes of a module that differ from layer to layer and decide nothing: its place, a wrapper's names
_PLACES = ("layer_idx", "layer_id", "layer_index", "name", "filed")


@contextmanager
def only(parts: assemble.Sketch, layers: Sequence[nn.Module], kept: Sequence[int]) -> Iterator[None]:
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


def signature(layer: nn.Module) -> Hashable:
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


def shape_of(batch: Batch) -> Hashable:
    learnt = 0 if batch.learnt is None else batch.learnt.numel()
    return tuple(batch.input_ids.shape), batch.lengths, batch.packed, learnt


def to_fake(model: nn.Module, made: dict[int, Any]) -> None:
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


def to_real(model: nn.Module, device: torch.device) -> None:
    """Meta tensors become small random numbers on `device`; a tied weight stays one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None:
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(_random(old, device), old.requires_grad)
                module._parameters[name] = made[id(old)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _random(buffer, device)


def _random(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    made = torch.empty(like.shape, dtype=like.dtype, device=device)
    return made.uniform_(-0.02, 0.02) if made.is_floating_point() else made.random_(0, 127)
