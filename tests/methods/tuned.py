"""A tiny model with a method on it, and what the tests ask of both."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ftrun.methods.base import Tuner
from ftrun.models.select import anatomy
from ftrun.values import Anatomy
from tests.families import tiny_model, tiny_tokenizer

IDS = torch.randint(5, 260, (3, 17), generator=torch.Generator().manual_seed(1))
# kind -> options that make each part of it work
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "houlsby": {"bottleneck": 8},
    "prompt": {"tokens": 5},
}
MERGING = ("full", "lora", "dora")


@dataclass
class Tuned:
    """A model, the method on it, its anatomy before the method came, and its logits then."""

    model: Any
    tuner: Tuner[Any]
    anatomy: Anatomy
    before: torch.Tensor


def tuner_of(kind: str, **options: Any) -> Tuner[Any]:
    module = importlib.import_module(f"ftrun.methods.{kind}")
    return module.Tuner(module.Options(**{**METHODS[kind], **options}))


def tuned(family: str, kind: str, kernels: str = "fast", base: nn.Module | None = None, **options: Any) -> Tuned:
    """`kind` with `options` on the tiny model of `family`, or on `base`, initialised with seed 0."""
    tuner = tuner_of(kind, **options)
    model = tiny_model(family) if base is None else base
    targets = getattr(tuner.options, "targets", None) or "all"
    if kind in ("dora", "prompt", "houlsby") and targets == "all" and family in ("mixtral", "qwen3_moe"):
        targets = "attention"
    parts = anatomy(model, targets, getattr(tuner.options, "layers", "all"))
    before = logits(model)
    tuner.attach(model, parts, kernels)
    tuner.initialise(model, 0, tiny_tokenizer())
    return Tuned(model, tuner, parts, before)


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def prompted(t: Tuned) -> torch.Tensor:
    """IDS with the method's virtual tokens in front."""
    first = t.model.get_input_embeddings().weight.shape[0]
    virtual = torch.arange(first, first + t.tuner.prefix).expand(len(IDS), -1)
    return torch.cat([virtual, IDS], 1)


def shake(t: Tuned, seed: int = 3) -> None:
    """Moves every trained value, so that the method does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameters in t.tuner.groups(t.model).values():
            for p in parameters:
                p.add_(torch.randn(p.shape, generator=generator) * 0.03)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, in units of the largest logit of b."""
    return float((a - b).abs().max() / b.abs().max())


def losses(model: nn.Module, parameters: list[nn.Parameter], steps: int = 10, skip: int = 0) -> list[float]:
    """The loss of each of `steps` AdamW steps on IDS; `skip` virtual positions are not in the model's logits."""
    optimiser = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
    found = []
    for _ in range(steps):
        out = model(IDS).logits[:, skip:].float()
        loss = F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss))
    return found
