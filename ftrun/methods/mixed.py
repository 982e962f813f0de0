"""Several adapters on one base, each row of a batch with its own: one product of the base for all of them.

A site has one `Mixed` in the base's place, which holds the adapters' own wrappers around the very same module. The
base's product runs once over all rows; each wrapper then joins its update to its own rows. Experts see tokens sorted
by expert, no rows any more: there the whole sublayer runs once an adapter, on the tokens of its rows.
Only for generation and evaluation: no gradient is asked for, and the adapters' values stay as they are.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ftrun.errors import UserError, unknown
from ftrun.methods import base
from ftrun.methods.lora import LoRAExperts
from ftrun.values import Anatomy


class Adapter:
    """One adapter beside others: its method's tuner, and its wrappers around the modules of the bare model.

    Raises UserError where the method trains the base's own weights.
    """

    def __init__(self, name: str, tuner: base.Tuner[Any], model: nn.Module, anatomy: Anatomy, kernels: str) -> None:
        if not tuner.switchable:
            raise UserError(
                f"adapters: {name} is of method={tuner.kind}, which trains the base's own weights; only adapters share "
                "a base"
            )
        self.name, self.tuner, self.anatomy = name, tuner, anatomy
        self.wrappers = nn.ModuleList(tuner.wrap(model, anatomy, kernels)).eval().requires_grad_(False)

    def load(self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """The values of a file. Raises UserError where it is not this method's, or of another base."""
        self.tuner.check(config)
        self.tuner.load_state(self.wrappers, tensors)

    def settle(self) -> None:
        """From here on the values stay as they are."""
        for wrapper in base.wrappers(self.wrappers):
            wrapper.settle(True)


class Rows:
    """Which adapter each row of the batch at hand has. turn: the one whose rows alone are run just now (experts)."""

    def __init__(self) -> None:
        self.count = 0
        self.places: dict[str, slice | torch.Tensor] = {}
        self.rest: torch.Tensor | None = None  # the rows of the base alone, where there are others
        self.turn: str | None = None

    def assign(self, names: Sequence[str | None], device: torch.device) -> None:
        """names: each row's adapter, None for the base alone."""
        found: dict[str | None, list[int]] = {}
        for row, name in enumerate(names):
            found.setdefault(name, []).append(row)
        self.count, rest = len(names), found.pop(None, [])
        self.places = {str(name): _place(rows, device) for name, rows in found.items()}
        self.rest = torch.tensor(rest, device=device) if rest and found else None

    @property
    def alone(self) -> str | None:
        """The adapter that all rows have; None where they have several, or rows without one are among them."""
        names = list(self.places)
        place = self.places[names[0]] if len(names) == 1 else None
        whole = isinstance(place, slice) and place.stop - place.start == self.count
        return names[0] if whole else None


class Mixed(nn.Module):
    """A module of the base with the wrappers of several adapters, by the adapters' names."""

    def __init__(self, wrappers: Mapping[str, base.Wrapper], rows: Rows) -> None:
        super().__init__()
        self.base = next(iter(wrappers.values())).base
        self.by_name, self.rows = dict(wrappers), rows
        self.wrappers = nn.ModuleList(wrappers.values())

    def forward(self, x: torch.Tensor) -> Any:
        assert self.rows.count, "no row has been given its adapter: Mix.assign comes first"
        if self.rows.alone in self.by_name:
            return self.by_name[self.rows.alone](x)
        mine = [(place, self.by_name[name]) for name, place in self.rows.places.items() if name in self.by_name]
        if not mine:
            return self.base(x)
        apart = self._by_row(x)
        seen = apart
        for place, wrapper in mine:
            part = apart[place]
            if (given := wrapper.seen(part)) is not part:
                seen = seen.clone() if seen is apart else seen
                seen[place] = given
        out = self.base(seen.view(x.shape))
        # some mixtures of experts give their router's scores as well
        first = out[0] if isinstance(out, tuple) else out
        joined = self._by_row(first)
        for place, wrapper in mine:
            joined[place] = wrapper.joined(apart[place], joined[place])
        return out

    def _by_row(self, x: torch.Tensor) -> torch.Tensor:
        """x with the batch's rows as its first size: some families lay all tokens one after another."""
        return x if x.shape[0] == self.rows.count else x.view(self.rows.count, -1, *x.shape[1:])

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: some models ask a layer for its dtype."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.base, "bias", None)


class Turns(nn.Module):
    """The experts' product with several adapters: that of the adapter whose turn it is."""

    def __init__(self, wrappers: Mapping[str, base.Wrapper], rows: Rows) -> None:
        super().__init__()
        self.base = next(iter(wrappers.values())).base
        self.by_name, self.rows = dict(wrappers), rows
        self.wrappers = nn.ModuleList(wrappers.values())

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.by_name.get(str(self.rows.turn), self.base)(x, offsets)
        return found


class Mix:
    """A model whose batches mix adapters. adapters: by name. `assign` says which row has which, before each pass of
    other rows.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter]) -> None:
        """Puts them in place. Raises UserError where an adapter tunes experts that cannot be told apart by row."""
        self.model, self.rows = model, Rows()
        self.adapters = {adapter.name: adapter for adapter in adapters}
        model.requires_grad_(False)
        sites: dict[str, dict[str, base.Wrapper]] = {}
        for adapter in adapters:
            adapter.settle()
            for wrapper in base.wrappers(adapter.wrappers):
                sites.setdefault(wrapper.name, {})[adapter.name] = wrapper
        sublayers: dict[str, Any] = {}
        for name in sorted(sites, key=lambda name: -name.count(".")):  # what lies within a module before the module
            inside = any(isinstance(wrapper, LoRAExperts) for wrapper in sites[name].values())
            if not inside and re.search(r"experts\.\d+\.", name):
                raise UserError(f"adapters: {name} is one expert of several, which sees tokens of no known row")
            if inside:
                above = name.rpartition(".")[0]
                sublayers[above] = model.get_submodule(above)
            base.swap(model, name, (Turns if inside else Mixed)(sites[name], self.rows).eval())
        for sublayer in sublayers.values():
            sublayer.forward = functools.partial(_in_turn, sublayer.forward, self.rows)

    def assign(self, names: Sequence[str | None]) -> None:
        """Each row's adapter in the passes to come, None for the base alone. Raises UserError on an unknown name."""
        for name in names:
            if name is not None and name not in self.adapters:
                raise UserError(unknown("the adapter", name, self.adapters))
        self.rows.assign(names, base.device_of(self.model))

    def prefix(self, name: str | None) -> int:
        """How many virtual tokens stand in front of this adapter's rows."""
        return self.adapters[name].tuner.prefix if name is not None else 0


def _place(rows: list[int], device: torch.device) -> slice | torch.Tensor:
    """Neighbours as a slice, which needs no copies."""
    if rows == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _in_turn(
    run: Callable[..., torch.Tensor], rows: Rows, hidden: torch.Tensor, *routing: torch.Tensor
) -> torch.Tensor:
    """A sublayer of experts, on each adapter's tokens alone. hidden (tokens, width), row after row of the batch."""
    assert rows.count, "no row has been given its adapter: Mix.assign comes first"
    given = [t.view(rows.count, -1, t.shape[-1]) for t in (hidden, *routing)]
    places: dict[str | None, slice | torch.Tensor] = {}
    places.update(rows.places)
    if rows.rest is not None or not places:
        places[None] = slice(0, rows.count) if rows.rest is None else rows.rest
    out = torch.empty_like(given[0])
    try:
        for name, place in places.items():
            rows.turn = name
            made = run(*(t[place].flatten(0, 1) for t in given))
            out[place] = made.view(-1, *out.shape[1:])
    finally:
        rows.turn = None
    return out.view(hidden.shape)
