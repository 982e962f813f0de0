"""Several processes at one job: which of them this one is, and the few numbers that they tell one another.

Torch's elastic launcher sets RANK, WORLD_SIZE and the rest (ftrun/train/launch.py); alone, nothing here does anything.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ftrun.errors import by_code, worded

_PATIENCE = datetime.timedelta(minutes=30)  # for the slowest thing that one rank does alone; a death is seen at once

# gloo's sockets, and NCCL
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


@dataclass(frozen=True)
class Ranks:
    """rank: of this process, from 0. world: how many there are. device: where its numbers lie (gloo: the CPU)."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return self.world == 1

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Each number's sum over the ranks, in float64."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def most(self, numbers: Sequence[float]) -> list[float]:
        """Each number's largest over the ranks."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return here if self.alone else self.most([float(here)])[0] > 0

    def told(self, value: Any, by: int = 0) -> Any:
        """The value of one rank, the first, on each of them: what JSON can say."""
        if self.alone:
            return value
        text = json.dumps(value, default=str).encode() if self.rank == by else b""
        size = int(self.sums([float(len(text))])[0])
        held = torch.zeros(size, dtype=torch.uint8)
        if self.rank == by:
            held.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        held = held.to(self.device)
        dist.broadcast(held, src=by)
        return json.loads(bytes(held.cpu().numpy()).decode())

    def each(self, tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Every rank's tensors, which need not be alike, in the order of ranks: on the first one's host alone."""
        if self.alone:
            return [dict(tensors)]
        found: list[dict[str, torch.Tensor]] = [{} for _ in range(self.world)]
        for rank, held in enumerate(found):
            facts = {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()}
            for name, (dtype, shape) in self.told(facts, by=rank).items():
                piece = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                if rank == self.rank:
                    piece.copy_(tensors[name])
                if piece.numel():
                    dist.broadcast(piece.view(-1), src=rank)
                if self.first:
                    held[name] = piece.cpu()
        return found

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What one rank meets within the block, which has none wait for another, is raised on all of them after it."""
        trouble = None
        try:
            yield
        except Exception as error:
            trouble = error
        self.agree(trouble)

    def agree(self, trouble: Exception | None) -> None:
        """Raises on all ranks what any of them has met: of several the lowest rank's."""
        by = self.world - int(self.most([float(self.world - self.rank) if trouble else 0.0])[0])
        if by == self.world:
            return
        code, message = self.told(worded(trouble) if trouble else None, by)
        raise trouble if trouble and self.rank == by else by_code(code, message)

    def wait(self) -> None:
        """Until all ranks are here."""
        if not self.alone:
            self.sums([0.0])

    def _reduced(self, numbers: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        if self.alone:
            return list(numbers)
        held = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        dist.all_reduce(held, how)
        return held.tolist()


def join(kind: str) -> Ranks:
    """This process's place among those that the launcher started; connects them. kind: the device type.

    Alone where no launcher did. Every rank of a CUDA job takes the card of its local rank.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ or world == 1:
        return Ranks()
    if not dist.is_initialized():
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, world = next(dist.rendezvous("env://", timeout=_PATIENCE))
        store.set_timeout(_PATIENCE)
        # torch's agent keeps one store for all restarts: where the ranks of the last one listened is still in it
        store = dist.PrefixStore(os.environ.get("FTRUN_ROUND", ""), store)
        how = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(how, store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def lost_touch(error: BaseException) -> bool:
    """Whether a message failed because the process at its other end is gone."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _GONE)


def end(code: int) -> NoReturn:
    """Ends this process, its connections as they are.

    Gloo's threads may hold the tensors of their last collective; to free one they need Python's lock, which whoever
    takes the connection down holds while it waits for them (seen: some ranks never ended). So nothing is taken down.
    """
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
