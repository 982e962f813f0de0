"""The decoder layers below all that trains, run alone or passed by: what they give does not change as the rest learns.

Any family: its own forward pass is run, with some of its layers handing on their input. The embeddings that are looked
up once more cost nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ftrun.errors import UserError
from ftrun.models.packing import Attended
from ftrun.values import Batch


class Prefix:
    """The first `below` of a decoder's `layers`. run: the whole decoder on a batch, for what its layers see."""

    def __init__(self, layers: Sequence[nn.Module], below: int, run: Callable[[Batch], Any]) -> None:
        self.layers, self.below, self.run = layers, below, run
        self.form: tuple[Any, ...] | None = None  # what a layer gives beside hidden states; None: a tensor alone

    def outputs(self, batch: Batch) -> torch.Tensor:
        """(rows, width, D): what the last of them gives, without a graph.

        Raises UserError where a layer hands on more than hidden states.
        """
        last = _Catch(self, self.layers[self.below - 1].forward)
        above = {number: Pass(self, number) for number in range(self.below, len(self.layers))}
        with torch.no_grad(), self._instead({self.below - 1: last, **above}):
            self.run(batch)
        assert last.hidden is not None
        return last.hidden

    @contextlib.contextmanager
    def passed(self, given: list[torch.Tensor]) -> Iterator[None]:
        """Within the block one forward pass begins above them, from the one tensor of `given`, which is taken out."""
        below = {number: Pass(self, number) for number in range(self.below)}
        below[self.below - 1].given = given
        with self._instead(below):
            yield

    def shaped(self, hidden: torch.Tensor) -> Any:
        """Hidden states as a layer of this family gives them."""
        return hidden if self.form is None else (hidden, *self.form)

    @contextlib.contextmanager
    def _instead(self, forwards: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
        """Other forward passes for these layers, for a while."""
        own: dict[int, Any] = {number: vars(self.layers[number]).get("forward") for number in forwards}
        for number, forward in forwards.items():
            self.layers[number].forward = forward
        try:
            yield
        finally:
            for number, forward in own.items():
                if forward is None:
                    del self.layers[number].forward
                else:
                    self.layers[number].forward = forward


class Pass:
    """The forward pass of a layer that is passed by. given: what to hand on in place of its input, taken out."""

    def __init__(self, prefix: Prefix, number: int) -> None:
        self.prefix, self.number = prefix, number
        self.given: list[torch.Tensor] | None = None

    def __call__(self, *args: Any, attended: Attended | None = None, **kwargs: Any) -> Any:
        if attended is not None:
            attended.passed.add(self.number)
        if self.given is not None:
            return self.prefix.shaped(self.given.pop())
        return self.prefix.shaped(args[0] if args else kwargs["hidden_states"])


class _Catch:
    """A layer's own forward pass, what it gives being noted."""

    def __init__(self, prefix: Prefix, forward: Callable[..., Any]) -> None:
        self.prefix, self.forward = prefix, forward
        self.hidden: torch.Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self.forward(*args, **kwargs)
        self.hidden, *rest = (found,) if isinstance(found, torch.Tensor) else found
        if any(one is not None for one in rest):
            raise UserError("keep_prefix: its layers hand on more than hidden states. Say keep_prefix=none")
        self.prefix.form = None if isinstance(found, torch.Tensor) else tuple(rest)
        return found
