"""Gradient checkpointing of whole decoder layers: their insides are computed again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(layers: Iterable[nn.Module], preserve_rng: bool) -> None:
    """Make each of `layers` keep only its input for the backward pass (Chen et al. 2016, arXiv:1604.06174).

    preserve_rng: whether the layers draw random numbers (dropout), which the second pass must draw again.
    """
    for layer in layers:
        layer.forward = functools.partial(_call, layer.forward, preserve_rng)


def keep_all(layers: Iterable[nn.Module]) -> None:
    """Undo `recompute`, where it was done."""
    for layer in layers:
        if isinstance(layer.forward, functools.partial) and layer.forward.func is _call:
            layer.forward = layer.forward.args[0]


def _call(forward, preserve_rng, *args, **kwargs):  # type: ignore[no-untyped-def]
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=preserve_rng, **kwargs)
