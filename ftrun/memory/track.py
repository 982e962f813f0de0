"""Follows every storage from the operation that makes it to the moment it is freed, by role.

Works on fake tensors, where nothing is allocated: the sizes are those of the real run, since the operations are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ftrun.memory import engine
from ftrun.memory.cost import Cost, cost_of
from ftrun.memory.pool import Block, CachingAllocator

Transient = Callable[[Any, Any, Any, Any], Iterable[int]]
FORWARD, BACKWARD = "forward", "backward"  # of a decoder layer
ROUNDING = "rounding"  # what an allocator adds to fill its blocks
HOST = "host"  # of what lies in the host's memory, for a device that is not the host: in no total
ROLES = (
    "weights",
    "quant_constants",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "batch",
    "other",
    ROUNDING,
)


@dataclass(frozen=True)
class Instant:
    """A named part of a step: `name` ("forward", "loss", "backward", …), the micro-batch, the decoder layer."""

    name: str
    part: int = 0
    layer: int | None = None

    def words(self, parts: int = 1) -> str:
        """As a user reads it: "backward of layer 31", with the micro-batch where there are several."""
        text = self.name if self.layer is None else f"{self.name} of layer {self.layer}"
        shared = self.name in ("clipping", "optimiser step")
        return text if parts == 1 or shared else f"{text}, micro-batch {self.part + 1}"

    def renumbered(self, layers: Sequence[int]) -> Instant:
        """The same instant, its layer's number being a place in `layers`."""
        return self if self.layer is None else Instant(self.name, self.part, layers[self.layer])


@dataclass
class Moment:
    """The live bytes by role at one moment."""

    total: int = 0
    by_role: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    host: int = 0  # bytes in the host's memory, which do not count in the total

    def copy(self) -> Moment:
        return Moment(self.total, dict(self.by_role), self.host)

    def plus(self, other: Moment, times: int = 1) -> Moment:
        """This, and `times` the other."""
        by_role = {role: size + times * other.by_role[role] for role, size in self.by_role.items()}
        return Moment(self.total + times * other.total, by_role, self.host + times * other.host)

    def less(self, other: Moment) -> Moment:
        """What this has more than the other."""
        return self.plus(other, -1)


@dataclass
class Segment:
    """What happens under one name: what was live as it began, and the moment at which most was."""

    instant: Instant
    start: Moment
    peak: Moment
    tick: int = 0  # how old the newest storage was at the peak
    cost: Cost = field(default_factory=Cost)  # its work, where the tracker counts it


class Held(NamedTuple):
    """A storage that is followed: its role, its bytes, what rounding adds, when it was first seen, its pool's block."""

    role: str
    size: int
    filling: int
    born: int
    block: Block | None = None


class Tracker(TorchDispatchMode):
    """While active, knows the live bytes by role, and in each segment the moment at which they were most.

    rounding: every block is a multiple of so many bytes (512 for CUDA's caching allocator, 1 for none); what that adds
    is booked as ROUNDING. counts: also count each segment's work.
    transient: (op, args, kwargs, out) -> the sizes in bytes of what the target's kernel allocates and frees within it.
    pool: an allocator to be fed with every request, in order; a storage then counts as its block does.
    """

    def __init__(
        self,
        rounding: int = 1,
        transient: Transient | None = None,
        pool: CachingAllocator | None = None,
        counts: bool = False,
    ) -> None:
        super().__init__()
        engine.exclusive()  # found out now: within an operation autograd is off
        self.rounding, self.transient, self.pool, self.counts = rounding, transient, pool, counts
        self.live: dict[int, Held] = {}  # by storage
        self.now = Moment()
        self.segments: list[Segment] = []
        self.tick = 0
        self.part = 0  # the micro-batch at hand
        self.default_role = "activations"  # of what an operation makes, until somebody marks it
        self._apart = False  # whether anything lies on the host
        self.begin(Instant("start"))

    @property
    def peak(self) -> Segment:
        """The segment with the highest moment, the first of equals."""
        return max(self.segments, key=lambda segment: segment.peak.total)

    def begin(self, instant: Instant) -> None:
        """A new segment, from what is live now."""
        self.segments.append(Segment(instant, self.now.copy(), self.now.copy(), self.tick))

    def forget(self) -> None:
        """The segments so far do not count."""
        self.segments.clear()

    def restart(self) -> None:
        """The segments so far do not count; the one at hand begins anew."""
        instant = self.segments[-1].instant
        self.forget()
        self.begin(instant)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for at every turn: two thirds of all that comes by
        reused = engine.repurposed(func, args)
        out = func(*args, **(kwargs or {}))
        if reused is not None:
            self._hand_over(reused)
        on_host = self._apart and any(isinstance(a, torch.Tensor) and self._is_apart(a) for a in tree_leaves(args))
        role = HOST if on_host else self.default_role
        if isinstance(out, torch.Tensor):  # by far the most
            self._follow(out, role)
        else:
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._follow(leaf, role)
        if self.transient is not None and not on_host:
            self._pass(self.transient(func, args, kwargs or {}, out))
        if self.counts and self.segments:
            self.segments[-1].cost = self.segments[-1].cost.plus(cost_of(func, args, out))
        return out

    def held(self, tensors: Iterable[torch.Tensor]) -> Moment:
        """What the storages behind `tensors` take, by role, each counted once."""
        found = Moment()
        for key in {own(tensor).untyped_storage()._cdata for tensor in tensors}:
            held = self.live[key]
            _add(found, held.role, held.size, held.filling)
        return found

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """New storages within the block belong to `name`."""
        before, self.default_role = self.default_role, name
        try:
            yield
        finally:
            self.default_role = before

    def mark(self, tensors: Iterable[torch.Tensor], role: str) -> None:
        """These tensors' storages belong to `role`, whatever they were before; unknown ones are followed from now."""
        for tensor in tensors:
            key = self._follow(tensor, role)
            held = self.live[key]
            if held.role in (role, HOST):
                continue
            self.live[key] = held._replace(role=role)
            moments = [self.now]
            if self.segments and held.born <= self.segments[-1].tick:  # it was there at the segment's peak
                moments.append(self.segments[-1].peak)
            for moment in moments:
                moment.by_role[held.role] -= held.size
                moment.by_role[role] += held.size

    def to_host(self, tensors: Iterable[torch.Tensor]) -> None:
        """These tensors' storages lie in the host's memory, and so does what is made of them."""
        self._apart = True
        for tensor in tensors:
            key = self._follow(tensor, HOST)
            held = self.live[key]
            _add(self.now, held.role, -held.size, -held.filling)
            self._release(held.block)
            self.live[key] = Held(HOST, held.size, 0, held.born)
            _add(self.now, HOST, held.size, 0)

    def from_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device."""
        before, self._apart = self._apart, False
        made = tensor.clone()
        self._apart = before
        return made

    def _is_apart(self, tensor: torch.Tensor) -> bool:
        held = self.live.get(own(tensor).untyped_storage()._cdata)
        return held is not None and held.role == HOST

    def resized(self, key: int, size: int) -> None:
        """A storage has got another size in place."""
        if key not in self.live:
            return
        held = self.live[key]
        _add(self.now, held.role, -held.size, -held.filling)
        self._release(held.block)
        filling, block = self._request(size)
        self.tick += 1
        self.live[key] = held._replace(size=size, filling=filling, born=self.tick, block=block)
        _add(self.now, held.role, size, filling)
        self._at_peak()

    def hold(self, size: int, role: str = "other") -> None:
        """So many bytes are taken for good by what is no tensor: a library's workspace."""
        _add(self.now, role, size, self._request(size)[0])
        self._at_peak()

    def _follow(self, tensor: torch.Tensor, role: str) -> int:
        storage = own(tensor).untyped_storage()
        key: int = storage._cdata
        if key in self.live:
            return key
        size = storage.nbytes()
        filling, block = self._request(size) if role != HOST else (0, None)
        self.tick += 1
        self.live[key] = Held(role, size, filling, self.tick, block)
        weakref.finalize(storage, self._drop, key)
        _add(self.now, role, size, filling)
        self._at_peak()
        return key

    def _pass(self, sizes: Iterable[int]) -> None:
        """Blocks that live within one operation, all at once."""
        taken = [(size, *self._request(size)) for size in sizes]
        for size, filling, _ in taken:
            _add(self.now, "other", size, filling)
        if taken:
            self._at_peak()
        for size, filling, block in taken:
            _add(self.now, "other", -size, -filling)
            self._release(block)

    def _hand_over(self, tensor: torch.Tensor) -> None:
        """The tensor's bytes become those of another one, which is followed next."""
        key = tensor.untyped_storage()._cdata
        if key in self.live:
            held = self.live[key]
            self.live[key] = held._replace(size=0, filling=0)
            _add(self.now, held.role, -held.size, -held.filling)

    def _request(self, size: int) -> tuple[int, Block | None]:
        """(what the allocator adds to a new block of `size` bytes, the pool's block)."""
        if self.pool is None:
            return -size % self.rounding, None
        block = self.pool.malloc(size)
        return (0 if block is None else block.size) - size, block

    def _release(self, block: Block | None) -> None:
        if self.pool is not None:
            self.pool.free(block)

    def _at_peak(self) -> None:
        if self.segments and self.now.total > self.segments[-1].peak.total:
            self.segments[-1].peak, self.segments[-1].tick = self.now.copy(), self.tick

    def _drop(self, key: int) -> None:
        held = self.live.pop(key)
        _add(self.now, held.role, -held.size, -held.filling)
        self._release(held.block)


def own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that lies in this process's memory: of one sharded over several processes, its part."""
    return getattr(tensor, "_local_tensor", tensor)


def _add(moment: Moment, role: str, size: int, rounding: int) -> None:
    if role == HOST:
        moment.host += size
        return
    moment.total += size + rounding
    moment.by_role[role] += size
    moment.by_role[ROUNDING] += rounding
