"""Several LoRA adapters as one: the weighted sum of their updates, Σ wᵢ sᵢ Bᵢ Aᵢ, exactly or at a smaller rank.

Exactly: the A one under another and the wᵢ sᵢ Bᵢ side by side, of rank Σ rᵢ, with the scale 1. At rank r: the best
approximation in the Frobenius norm (Eckart & Young 1936), by singular values that are computed from the factors: with
B = Q R and Aᵀ = P S the update is Q (R Sᵀ) Pᵀ, so that a matrix of Σ rᵢ by Σ rᵢ is all that is decomposed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ftrun.errors import UserError, unknown
from ftrun.methods import base, lora
from ftrun.methods.low_rank import Update
from ftrun.methods.mixed import Adapter
from ftrun.values import Anatomy, Site


class Factors(NamedTuple):
    """An update B A, its scale folded in: a (…, rank, in), b (…, out, rank), float32; experts lie in front."""

    a: torch.Tensor
    b: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Blend:
    """adapter: one LoRA adapter. kept: the share of the sum's Frobenius norm squared that it has; 1 where it is exact.

    rank: the largest that a weight has.
    """

    adapter: Adapter
    kept: float
    rank: int


def blend(
    model: nn.Module, adapters: Sequence[Adapter], weights: Mapping[str, float], rank: int | None, name: str = "blend"
) -> Blend:
    """The sum of these adapters' updates, each by its weight, as an adapter of the bare `model`; on its device.

    rank: no weight's update has more; None: exactly the sum. Raises UserError where one of them is more than a
    low-rank update, or where the weights name other adapters.
    """
    known = {adapter.name for adapter in adapters}
    for one in weights:
        if one not in known:
            raise UserError(unknown("blend: the adapter", one, known))
    parts: dict[str, list[Factors]] = {}
    sites: dict[str, Site] = {}
    for adapter in adapters:
        if adapter.name in weights:
            sites |= {site.name: site for site in adapter.anatomy.sites}
            for place, factors in _updates(adapter).items():
                parts.setdefault(place, []).append(Factors(factors.a, factors.b * weights[adapter.name]))
    whole, kept, total = {}, 0.0, 0.0
    for place, summands in parts.items():
        found, mine, all_of_it = _within(joined(summands), rank)
        whole[place], kept, total = found, kept + mine, total + all_of_it
    names = [name for name, _ in model.named_modules() if name in sites]  # PEFT nests experts in the model's order
    anatomy = dataclasses.replace(adapters[0].anatomy, sites=tuple(sites[name] for name in names))
    made = _adapter(model, name, anatomy, whole)
    return Blend(made, kept / total if total else 1.0, max(f.a.shape[-2] for f in whole.values()))


def joined(summands: Sequence[Factors]) -> Factors:
    """The sum of updates as one: its rank is the sum of theirs."""
    return Factors(torch.cat([one.a for one in summands], -2), torch.cat([one.b for one in summands], -1))


def truncated(factors: Factors, rank: int) -> tuple[Factors, torch.Tensor]:
    """(the nearest update of this rank or less, all singular values of the given one, (…, n)), by way of float64."""
    q, r = torch.linalg.qr(factors.b.double())
    p, s = torch.linalg.qr(factors.a.double().mT)
    u, values, v = torch.linalg.svd(r @ s.mT, full_matrices=False)
    roots = values[..., :rank].sqrt()
    b = (q @ u[..., :rank]) * roots[..., None, :]
    a = roots[..., None] * (v[..., :rank, :] @ p.mT)
    return Factors(a.to(factors.a.dtype), b.to(factors.b.dtype)), values


def _within(factors: Factors, rank: int | None) -> tuple[Factors, float, float]:
    """(the update at this rank at most, its norm squared, that of the whole)."""
    if rank is None or factors.a.shape[-2] <= rank:
        whole = float(((factors.b.mT @ factors.b) * (factors.a @ factors.a.mT)).double().sum())
        return factors, whole, whole
    found, values = truncated(factors, rank)
    squares = values.square()
    return found, float(squares[..., :rank].sum()), float(squares.sum())


def _updates(adapter: Adapter) -> dict[str, Factors]:
    """The adapter's updates by the names of their weights. UserError where it is more than that."""
    if adapter.tuner.kind != "lora":
        why = {
            "dora": "it also sets the length of each row of a weight, which no sum of low-rank updates can",
            "houlsby": "a nonlinearity stands between its two matrices",
            "prompt": "it is virtual tokens in front of the input",
        }.get(adapter.tuner.kind, "it is no low-rank update")
        raise UserError(f"blend: {adapter.name} is of method={adapter.tuner.kind}: {why}; only LoRA adapters blend")
    found = {}
    for wrapper in base.wrappers(adapter.wrappers):
        if not isinstance(wrapper, lora.LoRALinear | lora.LoRAEmbedding | lora.LoRAExperts):
            raise UserError(
                f"blend: {adapter.name} holds {wrapper.name} in full (method.modules_to_save), which is no low-rank "
                "update; only updates blend"
            )
        found[wrapper.name] = Factors(wrapper.lora_A.detach().float(), wrapper.scale * wrapper.lora_B.detach().float())
    return found


class _Tuner(lora.Tuner):
    """LoRA whose ranks are what the factors have, with the scale 1."""

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self.ranks = {name: one.a.shape[-2] for name, one in factors.items()}
        most = max(self.ranks.values())
        super().__init__(lora.Options(rank=most, alpha=most))

    @property
    def kind(self) -> str:
        return "lora"

    def plan(self, anatomy: Anatomy, kernels: str) -> dict[str, Update]:
        made = {}
        for site in anatomy.sites:
            rank = self.ranks[site.name]
            made[site.name] = Update(rank, rank, 1.0, 0.0, self.options.init, torch.float32, kernels)
        return made


def _adapter(model: nn.Module, name: str, anatomy: Anatomy, factors: Mapping[str, Factors]) -> Adapter:
    made = Adapter(name, _Tuner(factors), model, anatomy, "fast")
    for wrapper in base.wrappers(made.wrappers):
        own: Any = wrapper
        with torch.no_grad():
            own.lora_A.copy_(factors[wrapper.name].a)
            own.lora_B.copy_(factors[wrapper.name].b)
        wrapper.prepare()
    return made
