"""One model over several processes, by torch's engines: replicated (DDP) or sharded (FSDP2).

ddp: each rank holds the whole base; the gradients of what trains, and nothing else, cross the wire. fsdp: each rank
holds a part of every weight, quantised ones too (packed values and constants as they are stored, so that what is
gathered is what was there, bit for bit), and gathers a layer when it runs. Adapters are small: they stay whole on each
rank, as 8-bit optimisers want them, and their gradients are summed; under method=full what trains is sharded, and each
rank's optimiser keeps the state of its own shards.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ftrun.optim.layout import Layout
from ftrun.optim.state import of_all
from ftrun.train.gloo import Gather, Scatter
from ftrun.train.ranks import Ranks

Tensors = dict[str, torch.Tensor]


class Root(nn.Module):
    """The one door to a model that is shared: whatever runs it runs inside this module's forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)


class Alone:
    """One process: nothing is shared."""

    gathers = True  # whether the optimiser may keep small parameters as views of larger ones
    held_bytes = 0  # what the engine itself keeps between steps, in no parameter and no buffer
    offloads = False  # whether what is sharded, and the optimiser's state of it, lies in the host's memory
    settled = 1  # steps after which each takes the same memory: in the first the optimiser makes its state
    factor = 1.0  # of a loss before its backward pass: what the engine divides by

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """The call, with the model's weights at hand; in training and out of it."""
        return call(*args)

    def loss(self, call: Callable[..., Any], batch: Any) -> Any:
        """A loss that a backward pass follows."""
        return call(batch)

    def places(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        """What the engine keeps for a parameter between steps, where that is known."""
        return []

    def passing(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a micro-batch's passes; last: whether the step's gradients are whole after it."""
        return contextlib.nullcontext()

    def collect(self) -> None:
        """After the last backward pass: the step's gradients, summed over the ranks, where the optimiser reads them."""

    def held(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimiser knows a trained parameter by."""
        return parameter

    def joined(self, tensors: Tensors, meta: dict[str, Any], own: Sequence[Any]) -> tuple[Tensors, dict[str, Any]]:
        """An optimiser's state (optim/state.py) as one process would have it. own: its parameters, in order."""
        return tensors, meta

    def layout(self, known: Sequence[Layout]) -> Layout:
        """How this rank's optimiser holds what trains. known: as one process does, and each parameter by itself."""
        return known[0]

    def norm(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The norm of all gradients where this rank holds a part of them; None: what it holds is all."""
        return None


class Replicated(Alone):
    """DDP: gradients are averaged while the backward pass runs, in buckets that they live in."""

    settled = 2  # in the second step the buckets are cut anew, by the order in which gradients came

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.factor = float(ranks.world)
        self.held_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its successor would send the buffers all the same
            # all ranks have drawn or read the same values; buffers are constants of the base
            self.engine = nn.parallel.DistributedDataParallel(
                Root(model), init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def loss(self, call: Callable[..., Any], batch: Any) -> Any:
        return self.engine(call, batch)

    def passing(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self.engine.no_sync()


def mesh_of(ranks: Ranks) -> Any:
    """The ranks as FSDP2 wants them named; made outside of fake tensors, since it computes with real ones."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(ranks.device.type, (ranks.world,))


class Sharded(Alone):
    """FSDP2: each decoder layer a group of its own, all else the root's; gathered before it runs, let go after."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Any],
        whole: Sequence[nn.Parameter],
        mesh: Any,
        ranks: Ranks,
        offload: bool = False,
        ahead: bool = True,
    ) -> None:
        """whole: trained parameters that stay whole on each rank. offload: shards wait in host memory. ahead: whether
        the backward pass gathers the next layer while one is computed; over gloo that wins no time, and costs memory.
        """
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        self.whole, self.ranks = list(whole), ranks
        as_parameters(model)
        how: dict[str, Any] = {
            "mesh": mesh,
            "ignored_params": set(whole),
            "offload_policy": CPUOffloadPolicy(ranks.device.type == "cuda") if offload else OffloadPolicy(),
        }
        for layer in layers:
            fully_shard(layer, reshard_after_forward=True, **how)
        self.root: Any = fully_shard(Root(model), reshard_after_forward=True, **how)
        if not ahead:
            gather, scatter = Gather(), Scatter()
            for module in (*layers, self.root):
                module.set_custom_all_gather(gather)
                module.set_custom_reduce_scatter(scatter)
            for layer in layers:
                layer.set_modules_to_backward_prefetch([layer])
        self.parts: list[Any] = [p for p in model.parameters() if p.requires_grad and hasattr(p, "to_local")]
        self.gathers = not self.parts
        self.offloads = offload
        for parameter in whole:  # the sharded ones have been moved layer by layer
            parameter.data = parameter.data.to(ranks.device)
        self.factor = float(mesh.size()) if self.parts else 1.0  # FSDP2 averages what it scatters
        self._locals = {p: nn.Parameter(p.to_local().detach()) for p in self.parts}

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return self.root(call, *args)
        finally:
            self.root.reshard()

    def loss(self, call: Callable[..., Any], batch: Any) -> Any:
        return self.root(call, batch)

    def collect(self) -> None:
        sum_gradients(self.whole)
        for parameter, local in self._locals.items():
            if parameter.grad is not None:
                local.grad = parameter.grad.to_local()
                parameter.grad = None

    def held(self, parameter: nn.Parameter) -> nn.Parameter:
        return self._locals.get(parameter, parameter)

    def joined(self, tensors: Tensors, meta: dict[str, Any], own: Sequence[Any]) -> tuple[Tensors, dict[str, Any]]:
        """Moments in the parameters' shapes become whole. What has another shape (8 bits with a constant for each
        block of a shard) is kept rank by rank: on the first rank, the others have none of it."""
        if not self.parts:
            return tensors, meta
        if self.ranks.any(any(t.dim() and t.shape != own[_index(name)].shape for name, t in tensors.items())):
            each = [self.ranks.told(meta, by=rank) for rank in range(self.ranks.world)]
            return of_all(self.ranks.each(tensors)), {**each[0], "ranks": each}
        wholes = self._wholes(own)
        made = {name: full(_as_shard(t, wholes[_index(name)])).cpu() if t.dim() else t for name, t in tensors.items()}
        return made, {**meta, "shapes": [list(whole.shape) for whole in wholes]}

    def layout(self, known: Sequence[Layout]) -> Layout:
        return known[-1].part(self.ranks.rank, self.ranks.world) if self.parts else known[0]

    def _wholes(self, own: Sequence[Any]) -> list[Any]:
        """The sharded parameter behind each of the optimiser's."""
        behind = {local: whole for whole, local in self._locals.items()}
        return [behind[local] for local in own]

    def norm(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor | None:
        if not self._locals:
            return None
        gradients = [p.grad for p in parameters if p.grad is not None]
        square = torch.stack([g.float().square().sum() for g in gradients]).sum() if gradients else torch.zeros(())
        square = square.to(self.ranks.device)  # offloaded gradients lie on the host, where NCCL hears of nothing
        dist.all_reduce(square)
        return square.sqrt()


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Each gradient becomes its sum over the ranks: one message for each dtype."""
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(piece.view_as(gradient))


def as_parameters(model: nn.Module) -> None:
    """Quantised tensors, which are buffers, become frozen parameters, as FSDP2 shards no buffers; scalars stay."""
    for module in model.modules():
        if not hasattr(module, "parts"):
            continue
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.dim():
                del module._buffers[name]
                module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def _index(name: str) -> int:
    """The parameter that a tensor of an optimiser's state belongs to: "INDEX.KEY"."""
    return int(name.partition(".")[0])


def _as_shard(local: torch.Tensor, like: Any) -> Any:
    """A shard's tensor as the part that it is of a whole like `like`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def clip_by(norm: torch.Tensor, parameters: Sequence[torch.Tensor], largest: float | None) -> torch.Tensor:
    """Gradients scaled down to a norm of `largest`, given the norm of all; as torch's clip_grad_norm_ does."""
    if largest is not None and math.isfinite(largest):
        factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.device))
    return norm


def gathered(model: nn.Module, keeps: bool) -> Tensors:
    """The model's state dict, sharded tensors whole and on the host, tied ones one tensor; every rank must ask.

    keeps: whether this rank wants it; {} where not.
    """
    owners = dict(model.named_parameters(remove_duplicate=False))
    made: dict[int, torch.Tensor] = {}
    found: Tensors = {}
    for name, tensor in model.state_dict().items():
        key = id(owners.get(name, tensor))
        if key not in made:
            whole = full(tensor).cpu()
            made[key] = whole if keeps else torch.empty(0)
        found[name] = made[key]
    return found if keeps else {}


def cut_as(whole: torch.Tensor, like: Any) -> torch.Tensor:
    """A whole tensor in parts as `like` is; itself where that is whole. Every rank has it; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(like, "device_mesh"):
        return whole
    placed = whole.to(like.device_mesh.device_type)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def held_whole(tensor: Any) -> torch.Tensor:
    """A tensor, whole; one that was sharded on the host: with others it would not fit where it lay in parts."""
    return full(tensor).cpu() if hasattr(tensor, "to_local") else tensor


def full(tensor: Any) -> torch.Tensor:
    """A tensor that may be sharded, whole; every rank must ask."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    made: torch.Tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # its part may wait on the host
    return made
