"""bitsandbytes' optimisers, made fit for fake tensors. Importing this imports bitsandbytes, which takes seconds."""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer1State, Optimizer2State
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

_UPDATES = ("bitsandbytes::optimizer_update_32bit", "bitsandbytes::optimizer_update_8bit_blockwise")


class _Unfused(TorchDispatchMode):
    """An update as the CPU computes it, operation by operation, where its stand-in for fake tensors does nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = functools.partial(func._op_dk, torch._C.DispatchKey.CPU) if func.name() in _UPDATES else func
        return call(*args, **(kwargs or {}))


class _Fit:
    """A group's own `bits`, where it has them; and the map from 8-bit codes to numbers, 256 float32.

    bitsandbytes computes the map with `item()`, which fake tensors do not have. device: "cpu" or "cuda", the job's: on
    a CPU an update takes temporaries of its parameter's size, which a plan on fake tensors must see.
    """

    name2qmap: dict[str, torch.Tensor]
    device = "cpu"

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config(gindex, pindex, group)  # type: ignore[misc]
        return {**config, "optim_bits": group.get("bits", config["optim_bits"])}

    def fill_qmap(self) -> None:
        if isinstance(torch.empty(0), FakeTensor):
            self.name2qmap = {name: torch.empty(256) for name in ("dynamic", "udynamic")}
        else:
            super().fill_qmap()  # type: ignore[misc]

    def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        abstract = isinstance(p.data, FakeTensor) and self.device == "cpu"
        with _Unfused() if abstract else contextlib.nullcontext():
            super().update_step(group, p, gindex, pindex)  # type: ignore[misc]


class TwoMoments(_Fit, Optimizer2State):
    """Adam's family. State of a parameter: state1 and state2, with qmap and absmax where they are uint8."""


class OneMoment(_Fit, Optimizer1State):
    """Lion's family. State of a parameter: state1, with qmap1 and absmax1 where it is uint8."""


def make(
    kind: type[Any], name: str, groups: list[dict[str, Any]], device: str, **options: Any
) -> torch.optim.Optimizer:
    """The optimiser for tensors on `device`; what `Options.notes` says of paging, bitsandbytes does not say again."""
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    made: Any = kind(name, groups, **options)
    made.device = device
    return made
