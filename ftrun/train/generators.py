"""The generators that training draws from, taken down and set back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from ftrun.optim.state import of_all, of_rank
from ftrun.train.ranks import Ranks


def random_state() -> dict[str, torch.Tensor]:
    """The state of every generator that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random(state: Mapping[str, torch.Tensor]) -> None:
    """Set the generators as `random_state` found them."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_rank(seed: int, step: int, ranks: Ranks) -> None:
    """Give each rank a stream of its own, from `step` on: equal streams would draw the same masks for all rows."""
    digest = hashlib.sha256(f"{seed} {step} {ranks.rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def state_of_each(ranks: Ranks) -> dict[str, torch.Tensor]:
    """Every rank's `random_state` on the first one, the others' by "NAME@RANK"; all ranks must ask."""
    return of_all(ranks.each(random_state()))


def restore_of_each(states: Mapping[str, torch.Tensor], ranks: Ranks) -> bool:
    """Set this rank's generators as `state_of_each` found them; False, and nothing is set, where it found others."""
    if sum(name.partition("@")[0] == "cpu" for name in states) != ranks.world:
        return False
    restore_random(of_rank(states, ranks.rank))
    return True
