"""Follows every storage from the operation that makes it to the moment it is freed, by role.

Works on fake tensors, where nothing is allocated: the sizes are those of the real run, since the operations are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ftrun.memory.pool import Block, CachingAllocator

ROLES = ("weights", "quant_constants", "adapters", "gradients", "optimizer", "activations", "logits", "batch", "other")


@dataclass
class Moment:
    """The live bytes by role at one instant, and what ran then."""

    total: int = 0
    by_role: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    label: str = ""


class Tracker(TorchDispatchMode):
    """While active, knows the live bytes by role, and the moment at which they were most.

    rounding: every storage counts as a multiple of so many bytes (512 for CUDA's caching allocator, 1 for none).
    transient: (op, args, kwargs, out) -> the sizes in bytes of what the target's kernel allocates and frees within it.
    pool: an allocator to be fed with every request, in order; a storage then counts as its block does.
    """

    def __init__(
        self,
        rounding: int = 1,
        transient: Callable[[Any, Any, Any, Any], Iterable[int]] | None = None,
        pool: CachingAllocator | None = None,
    ) -> None:
        super().__init__()
        self.rounding = rounding
        self.transient = transient
        self.pool = pool
        self.blocks: dict[int, Block] = {}  # storage -> its block in the pool
        self.live: dict[int, tuple[str, int]] = {}  # storage -> role, bytes
        self.now = Moment()
        self.peak = Moment()
        self.label = ""
        self._role = "activations"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf, self._role)
        if self.transient is not None:
            self._pass(self.transient(func, args, kwargs or {}, out))
        return out

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """New storages within the block belong to `name`."""
        before, self._role = self._role, name
        try:
            yield
        finally:
            self._role = before

    def mark(self, tensors: Iterable[torch.Tensor], role: str) -> None:
        """These tensors' storages belong to `role`, whatever they were before; unknown ones are followed from now."""
        for tensor in tensors:
            key = self._follow(tensor, role)
            if key is None or key not in self.live or self.live[key][0] == role:
                continue
            old, size = self.live[key]
            self.live[key] = (role, size)
            self.now.by_role[old] -= size
            self.now.by_role[role] += size

    def reset_peak(self) -> None:
        """From here on the peak is a new one."""
        self.peak = Moment(self.now.total, dict(self.now.by_role), self.label)

    def _follow(self, tensor: torch.Tensor, role: str) -> int | None:
        if tensor.device.type == "meta":
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return key
        size, block = self._request(storage.nbytes())
        if block is not None:
            self.blocks[key] = block
        self.live[key] = (role, size)
        weakref.finalize(storage, self._drop, key)
        self._add(role, size)
        self._at_peak()
        return key

    def hold(self, nbytes: int, role: str = "other") -> None:
        """So many bytes are taken for good by what is no tensor: a library's workspace."""
        self._add(role, self._request(nbytes)[0])
        self._at_peak()

    def _pass(self, sizes: Iterable[int]) -> None:
        """Blocks that live within one operation, all at once."""
        taken = [self._request(nbytes) for nbytes in sizes]
        for size, _ in taken:
            self._add("other", size)
        self._at_peak()
        for size, block in taken:
            self._add("other", -size)
            if self.pool is not None:
                self.pool.free(block)

    def _request(self, nbytes: int) -> tuple[int, Block | None]:
        """(bytes counted, block of the pool) of a new storage."""
        if self.pool is None:
            return -(-nbytes // self.rounding) * self.rounding, None
        block = self.pool.malloc(nbytes)
        return (0 if block is None else block.size), block

    def _at_peak(self) -> None:
        if self.now.total > self.peak.total:
            self.peak = Moment(self.now.total, dict(self.now.by_role), self.label)

    def _drop(self, key: int) -> None:
        role, size = self.live.pop(key)
        self._add(role, -size)
        if key in self.blocks and self.pool is not None:
            self.pool.free(self.blocks.pop(key))

    def _add(self, role: str, size: int) -> None:
        self.now.total += size
        self.now.by_role[role] += size
