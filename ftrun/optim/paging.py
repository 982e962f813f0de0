"""Paged state: what can page, and what is said where nothing can. Light: read before torch is imported."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PAGED_FROM = 100_000  # elements: bitsandbytes leaves smaller tensors in device memory


def paging_note(name: str, paged: bool, device: str) -> list[str]:
    """One line where `paged` is asked for and `device` cannot page."""
    if paged and device != "cuda":
        return [f"{name}: paging needs CUDA; here the state stays in ordinary memory"]
    return []


def paged_bytes(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor] | None = None) -> int:
    """Bytes of the optimiser's state that may move to host memory, whether its tensors are real or fake.

    parameters: count the state of these alone.
    """
    if not getattr(optimizer, "is_paged", False):
        return 0
    chosen = list(optimizer.state) if parameters is None else [p for p in parameters if p in optimizer.state]
    big = (optimizer.state[p] for p in chosen if p.numel() >= PAGED_FROM)
    return sum(state[k].nbytes for state in big for k in ("state1", "state2") if k in state)
