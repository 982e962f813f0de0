"""Experts by grouped products: the sublayer of transformers 5 with each 3-D parameter as a module of its own.

transformers keeps a layer's experts as two parameters (experts, out, in) of one module and multiplies inside it, so
nothing can be put around a product. `group_experts` turns such a module, in place, into one whose `gate_up_proj` and
`down_proj` are modules `(tokens, in), offsets -> (tokens, out)`: `ExpertsLinear` for a plain parameter, a quantised
one, or a wrapper around either (LoRA). A site's name ("…mlp.experts.gate_up_proj") is then a module's name.
Routing, order and sums are those of transformers' `grouped_mm_experts_forward` (integrations/moe.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

NAMES = ("gate_up_proj", "down_proj")
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds a layer's experts as 3-D parameters, or did before `group_experts`."""
    if isinstance(module, GroupedExperts):
        return True
    return any(p.dim() == 3 for n, p in module.named_parameters(recurse=False) if n.endswith("_proj"))


def why_not(module: nn.Module) -> str | None:
    """Why these experts cannot be grouped, or None where they can."""
    found = {n for n, _ in module.named_parameters(recurse=False)}
    if not hasattr(module, "_apply_gate") or not hasattr(module, "num_experts"):
        return "their sublayer is not the one that transformers 5 gives to its mixtures of experts"
    if found != set(NAMES) or not getattr(module, "has_gate", False):
        return f"their parameters are {', '.join(sorted(found))}, expected {' and '.join(NAMES)}"
    if module.is_transposed or module.has_bias or module.has_post_expert_norm:
        return "they are stored transposed, or have biases or norms of their own"
    return None


def group_experts(module: nn.Module, make: Callable[[str, nn.Parameter], nn.Module]) -> nn.Module:
    """Replaces each 3-D parameter by the module `make(name, parameter)`, in place; returns `module`.

    Its class becomes a subclass of its own class, so that its other attributes and `isinstance` stay true.
    Raises ValueError where `why_not` has a reason.
    """
    if isinstance(module, GroupedExperts):
        return module
    reason = why_not(module)
    if reason:
        raise ValueError(reason)
    for name in NAMES:
        parameter = module._parameters.pop(name)
        assert parameter is not None
        module.add_module(name, make(name, parameter))
    old = type(module)
    cast(Any, module).__class__ = type(f"Grouped{old.__name__}", (GroupedExperts, old), {"ungrouped": old})
    return module


def ungroup_experts(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The way back: the modules' dense weights as plain parameters under transformers' own names, in place."""
    if not isinstance(module, GroupedExperts):
        return module
    for name in NAMES:
        held = module._modules.pop(name)
        weight = held.weight if isinstance(held, ExpertsLinear) else cast(Any, held).dense(dtype)
        module.register_parameter(name, nn.Parameter(weight.detach(), requires_grad=False))
    cast(Any, module).__class__ = module.ungrouped
    return module


class ExpertsLinear(nn.Module):
    """A plain 3-D parameter (experts, out, in) and its product. `dense(dtype)` gives (experts, out, in)."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    @property
    def experts(self) -> int:
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1]

    @property
    def in_features(self) -> int:
        return self.weight.shape[2]

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return grouped_product(x, self.weight, offsets)

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.weight if dtype is None else self.weight.to(dtype)


class GroupedExperts(nn.Module):
    """Experts whose products are modules. Never built: `group_experts` makes an experts module one of these."""

    ungrouped: type[nn.Module]

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """hidden (tokens, width); top_k_index, top_k_weights (tokens, k) -> (tokens, width)."""
        this = cast(Any, self)
        return routed(
            hidden, top_k_index, top_k_weights, this.num_experts, this.gate_up_proj, this._apply_gate, this.down_proj
        )


def grouped_product(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Rows of x (tokens, in), sorted by expert, times their expert's matrix (experts, out, in): (tokens, out).

    offsets int32 (experts,): where each expert's rows end. x is cast to the weight's dtype; gradients flow to both.
    """
    return grouped_mm(x.to(weight.dtype), weight.transpose(-2, -1), offsets)


def grouped_mm(x: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x (tokens, a) sorted by expert, matrices (experts, a, b), one dtype -> (tokens, b).

    One kernel in bfloat16 where every size is a multiple of 8; a product an expert otherwise. A registered operator
    (`ftrun::grouped_mm`), since torch's own has no fake tensors in float32 and refuses small ranks.
    """
    return torch.ops.ftrun.grouped_mm(x, matrices, offsets)


def _grouped_mm(x: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    if _one_kernel(x, matrices):
        return F.grouped_mm(x.contiguous(), matrices, offs=offsets)
    out = x.new_empty(x.shape[0], matrices.shape[2])
    for matrix, begin, end in _ranges(matrices, offsets):
        torch.mm(x[begin:end], matrix, out=out[begin:end])
    return out


def _grouped_outer(x: torch.Tensor, y: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x (tokens, a), y (tokens, b) -> x^T y of each expert's rows, (experts, a, b)."""
    if _one_kernel(x, y):
        return F.grouped_mm(x.contiguous().T, y.contiguous(), offs=offsets)
    out = x.new_zeros(offsets.shape[0], x.shape[1], y.shape[1])
    for matrix, begin, end in _ranges(out, offsets):
        torch.mm(x[begin:end].T, y[begin:end], out=matrix)
    return out


def _one_kernel(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether torch's grouped product takes these: bfloat16, sizes of whole 16 bytes, torch 2.10, a recent GPU."""
    if not hasattr(F, "grouped_mm") or x.dtype != torch.bfloat16 or x.shape[0] == 0:
        return False
    if any(size % 8 for size in (x.shape[1], *other.shape[1:])):
        return False
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)


def _ranges(matrices: torch.Tensor, offsets: torch.Tensor) -> Iterator[tuple[torch.Tensor, int, int]]:
    begin = 0
    for index, end in enumerate(offsets.tolist()):
        if end > begin:
            yield matrices[index], begin, end
        begin = end


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    x, matrices, offsets = inputs
    for_x, for_matrices = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if for_matrices else None, matrices if for_x else None, offsets)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    x, matrices, offsets = ctx.saved_tensors
    for_x = None if matrices is None else grouped_mm(grad, matrices.transpose(-2, -1), offsets)
    return for_x, None if x is None else torch.ops.ftrun.grouped_outer(x, grad, offsets), None


def _register() -> None:
    define, implement, fake = torch.library.define, torch.library.impl, torch.library.register_fake
    define("ftrun::grouped_mm", "(Tensor x, Tensor matrices, Tensor offsets) -> Tensor")
    implement("ftrun::grouped_mm", "default", _grouped_mm)
    fake("ftrun::grouped_mm", lambda x, matrices, offsets: x.new_empty(x.shape[0], matrices.shape[2]))
    define("ftrun::grouped_outer", "(Tensor x, Tensor y, Tensor offsets) -> Tensor")
    implement("ftrun::grouped_outer", "default", _grouped_outer)
    fake("ftrun::grouped_outer", lambda x, y, offsets: x.new_empty(offsets.shape[0], x.shape[1], y.shape[1]))
    torch.library.register_autograd("ftrun::grouped_mm", _gradients, setup_context=_keep)


def routed(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    experts: int,
    up: Product,
    gate: Callable[[torch.Tensor], torch.Tensor],
    down: Product,
) -> torch.Tensor:
    """The sublayer: each token through its k experts, weighted and summed. Shapes as in `GroupedExperts.forward`."""
    k = top_k_index.shape[-1]
    expert, order = torch.sort(top_k_index.reshape(-1))
    # histc, not bincount: its size never depends on the data; a CPU counts floats only
    counted = expert.int() if expert.is_cuda else expert.float()
    counts = torch.histc(counted, bins=experts, min=0, max=experts - 1)
    offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
    out = down(gate(up(hidden[order // k], offsets)), offsets)
    out = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    return out[back].view(hidden.shape[0], k, -1).sum(dim=1).to(hidden.dtype)


_register()
