"""Paged state: what can page, and what is said where nothing can. Light: read before torch is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PAGED_FROM = 100_000  # elements: bitsandbytes leaves smaller tensors in device memory


def paging_note(name: str, paged: bool, device: str) -> list[str]:
    """One line where `paged` is asked for and `device` cannot page."""
    if paged and device != "cuda":
        return [f"{name}: paging needs CUDA; here the state stays in ordinary memory"]
    return []


def paged_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimiser's state that may move to host memory, whether its tensors are real or fake."""
    if not getattr(optimizer, "is_paged", False):
        return 0
    big = (state for p, state in optimizer.state.items() if p.numel() >= PAGED_FROM)
    return sum(state[k].nbytes for state in big for k in ("state1", "state2") if k in state)
