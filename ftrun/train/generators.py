"""The generators that training draws from, taken down and set back."""

from __future__ import annotations

from collections.abc import Mapping

import torch


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
