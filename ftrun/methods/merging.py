"""What a tuned model's weights are once base and update are one, by the names of the bare model; and what rounding
takes away from the update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ftrun.kernels.dense import Dense, dense_weight, is_conv1d, is_linear
from ftrun.methods.base import Wrapper, wrappers

Round = Callable[[Wrapper, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Loss:
    """What rounding does to one module's update U = merged − base, in sums of squares and products (float64).

    kept: ⟨round(merged) − base, U⟩. error: ‖round(merged) − merged‖². update: ‖U‖².
    """

    kept: float = 0.0
    error: float = 0.0
    update: float = 0.0

    @property
    def share(self) -> float:
        """The share of the update that is gone, 1 − kept / update: 0, all of it is there, along its own direction; 1,
        none is: weights that lie on the file's grid fall back to where they were. Noise that has nothing to do with
        the update does not count; by chance it leaves a little above or below 0.
        """
        return 1 - self.kept / self.update if self.update else 0.0

    @property
    def noise(self) -> float:
        """All that rounding moves, error / update; infinite where there is no update."""
        if self.update:
            return self.error / self.update
        return float("inf") if self.error else 0.0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.kept + other.kept, self.error + other.error, self.update + other.update)


def losses(model: nn.Module, rounded: Round) -> Iterator[tuple[str, Loss]]:
    """(module's name, what is lost of its update) of every wrapped module, one at a time.

    rounded: the merged float32 weight as the output holds it, in float32 again; it gets the wrapper and the weight.
    """
    with torch.no_grad():
        for wrapper in wrappers(model):
            merged, own = wrapper.merged_weight(), base_weight(wrapper)
            held, update = rounded(wrapper, merged), merged - own
            kept = float(torch.sum((held - own) * update, dtype=torch.float64))
            yield wrapper.name, Loss(kept, _square(held - merged), _square(update))


def base_weight(wrapper: Wrapper) -> torch.Tensor:
    """The base's own weight below a wrapper, float32: (out, in), (experts, out, in), or an embedding's rows."""
    own = dense_weight(wrapper.base, torch.float32) if is_linear(wrapper.base) else wrapper.weight.float()
    return own.detach()


def merged_tensor(model: nn.Module, bare: nn.Module, name: str) -> torch.Tensor:
    """The tensor that the bare model calls `name` ("…q_proj.weight"), with what was learnt in it; no gradient.

    model: the tuned one. bare: its skeleton before quantiser and method, for the way a matrix lies (Conv1D's is
    turned). Merged and dequantised weights are fresh and float32, all others the model's own, in their dtype.
    """
    with torch.no_grad():
        parent, _, leaf = name.rpartition(".")
        held = model.get_submodule(parent)
        if leaf in held._modules:  # experts: the parameter of the bare model is a module here
            child = held.get_submodule(leaf)
            return child.merged_weight() if isinstance(child, Wrapper) else dense_weight(child, torch.float32)
        if leaf == "weight" and (isinstance(held, Wrapper) or _stored(held)):
            matrix = held.merged_weight() if isinstance(held, Wrapper) else dense_weight(held, torch.float32)
            return matrix.T if is_conv1d(bare.get_submodule(parent)) else matrix
        if leaf == "bias" and isinstance(held, Wrapper):
            bias = held.merged_bias()
            assert bias is not None, name
            return bias.detach()
        found: torch.Tensor = getattr(held, leaf)
        return found.detach()


def tied(model: nn.Module) -> bool:
    """Whether embedding and head of the tuned model are still one weight: both as they were, or trained as one."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    kept = [getattr(end, "kept", None) for end in ends]
    if any(one is not None for one in kept):
        return kept[0] is kept[1]
    return not any(isinstance(end, Wrapper) for end in ends) and ends[0].weight is ends[1].weight


def _stored(module: nn.Module) -> bool:
    """Whether the layer makes its matrix on demand, being quantised."""
    return isinstance(module, Dense) and "weight" not in module._parameters


def _square(difference: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
