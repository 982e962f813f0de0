"""The values that rooms hand to one another. Plain data: no room's code is needed to read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IGNORE = -100  # a target that is not learnt, as torch's cross-entropy has it


@dataclass(frozen=True)
class Site:
    """One weight of the model that a method may tune.

    name: dotted module name ("model.layers.0.self_attn.q_proj"); for experts stored as one 3-D parameter, the
    parameter's own name ("model.layers.0.mlp.experts.gate_up_proj").
    role: q k v qkv o gate up gate_up down embeddings head experts_gate_up experts_down.
    layer: index of the decoder layer, None for embeddings and head.
    """

    name: str
    role: str
    layer: int | None
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Block:
    """One decoder layer: where its two sublayers end. Names are dotted module names.

    attention_out: the linear layer that ends attention; ffn_out: the one that ends the feed-forward (None where
    experts end it); ffn: the whole feed-forward module (None where the layer has none of its own, as in OPT).
    """

    index: int
    name: str
    attention_out: str
    ffn_out: str | None
    ffn: str | None


@dataclass(frozen=True)
class Anatomy:
    """A model's parts by role, in the order of the model, before any method has touched it."""

    sites: tuple[Site, ...]  # the selected ones
    blocks: tuple[Block, ...]  # the selected layers
    depth: int  # decoder layers in all
    width: int  # hidden size
    embeddings: str  # dotted name of the input embedding
    head: str  # dotted name of the output head
    tied: bool  # the head is the embedding's own weight


def rounded(tokens: int) -> int:
    """The size that so many tokens are filled up to, by at most a 32nd part, or 7.

    Kernels are prepared, tuned or compiled for each new size: so there are few of them, and they fit whole tiles.
    """
    step = max(8, 1 << max(0, tokens.bit_length() - 6))
    return -(-tokens // step) * step


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch, shifted and ready. All counts are Python numbers: no device is asked.

    input_ids, position_ids, targets: int64, (1, sum(lengths) + filler) when packed, else (rows, max(lengths)) padded
    right. targets[i] is the token that follows input_ids[i] in its own row, or IGNORE where it is not learnt.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...]  # tokens of each row, in order
    packed: bool
    tokens: int  # real ones
    supervised: int  # targets that are learnt
    rows: tuple[int, ...]  # each row's index in its data, to name it in messages
    filler: int = 0  # tokens of a last row of padding, where packed: see `rounded`
    learnt: torch.Tensor | None = None  # int64: where the flattened targets are learnt; found here, on the host
    # (packed: a rounded number of places, the last ones repeating a place that is not learnt)

    def __post_init__(self) -> None:
        if self.learnt is not None:
            return
        unlearnt = self.targets.flatten() == IGNORE
        found = (~unlearnt).nonzero().squeeze(-1)
        more = rounded(found.numel()) - found.numel()
        if self.packed and more and unlearnt.any():
            found = found.new_tensor([*found.tolist(), *[int(unlearnt.nonzero()[0])] * more])
        object.__setattr__(self, "learnt", found)

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The same batch with every tensor changed."""
        names = ("input_ids", "position_ids", "targets", "learnt")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step, as metrics.jsonl has it."""

    step: int
    loss: float  # nats, mean over the step's supervised tokens
    lr: float
    grad_norm: float
    tokens: int  # real ones, over all devices
    supervised_tokens: int
    tokens_per_s: float
    mem_allocated: int  # bytes
    mem_peak: int  # bytes
    seconds: float
    skipped: bool = False  # its loss or gradients were not finite: no weight was changed


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation, as evals.jsonl has it."""

    step: int
    loss: float
    perplexity: float
    tokens: int
    seconds: float
    best: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
