"""From a batch to its loss through a transformers model: packed rows and chunked logits, or the plain way."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ftrun.kernels.attention import packed_attention
from ftrun.kernels.loss import CHUNK, Shape, chunked_loss, full_loss
from ftrun.models.packing import Attended, refusal
from ftrun.values import IGNORE, Batch

PACKED = "ftrun_packed"  # the name under which transformers finds our attention
TRIAL = "ftrun_trial"  # notes what a family's code hands to attention (ftrun/models/fuse.py)
PLAIN = "ftrun_plain"  # transformers' own "sdpa", told by the host whether anything is padded
_CALLS: contextvars.ContextVar[list[Any]] = contextvars.ContextVar("calls")
_UNPADDED = contextvars.ContextVar("unpadded", default=False)  # every row of the batch at hand is as long as the batch


def register_attention() -> None:
    """Make PACKED and PLAIN attention implementations of transformers: one without a mask, one with its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(PACKED, attend)
    AttentionInterface.register(TRIAL, _note)
    AttentionMaskInterface.register(PACKED, _no_mask)
    AttentionInterface.register(PLAIN, sdpa_attention_forward)
    AttentionMaskInterface.register(PLAIN, _plain_mask)


@contextlib.contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Another attention implementation for a while: PACKED knows no cache, generation needs one that does."""
    before, name = model.config._attn_implementation, known(type(model), name)
    if name == before:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def known(family: Any, name: str) -> str:
    """`name`, or what a family has in its place: "eager" where it has no "sdpa" (Gemma 2, for its capped scores),
    "sdpa" for PLAIN where its attention is code of its own."""
    if family is None or name not in ("sdpa", PLAIN):
        return name
    if not getattr(family, "_supports_sdpa", True):
        return "eager"
    return "sdpa" if name == PLAIN and not family._can_set_attn_implementation() else name


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Rows are kept apart by their lengths; a dense mask would only cost memory."""


def _plain_mask(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """As transformers masks "sdpa". It reads a mask's values to see that nothing is padded, and then needs no mask;
    fake tensors have no values, and a plan would hold a mask that the run has not."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(attention_mask=None if _UNPADDED.get() else attention_mask, **kwargs)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    row_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    attended: Attended | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (B, H, T, D) in, (B, T, H, D) out."""
    if attended is not None and row_lengths is not None:
        attended.note(module, sliding_window, attention_mask, kwargs)
    lengths = row_lengths or (query.shape[2],)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = packed_attention(query, key, value, lengths, scale, sliding_window, softcap, dropout)
    return out.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def seen_in_trial() -> Iterator[list[tuple[tuple[torch.Tensor, ...], dict[str, Any]]]]:
    """Within the block, calls of the attention function TRIAL: (query, key, value) and what else was told."""
    calls: list[Any] = []
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


def _note(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **told: Any,
) -> tuple[torch.Tensor, None]:
    _CALLS.get().append(((query, key, value), told))
    return query.transpose(1, 2), None


class TokenLoss:
    """Batch -> the sum of its supervised tokens' losses in nats, a float32 scalar that gradients flow through."""

    def __init__(self, model: Any, kernels: str, chunk: int = CHUNK) -> None:
        self.model, self.chunk = model, chunk
        self.fast = kernels == "fast"
        self.shape = logit_shape(model.config)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Packed batches run on PACKED attention, padded ones on transformers' own."""
        return self.score(self.hidden(batch) if self.fast else self.logits(batch), batch)

    def score(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss of what the model gave: hidden states when fast, logits on the plain way."""
        if not self.fast:
            return full_loss(outputs, batch.targets)
        assert batch.learnt is not None
        hidden = outputs.flatten(0, 1).index_select(0, batch.learnt)
        head = self.model.get_output_embeddings()
        targets = batch.targets.flatten()[batch.learnt]
        return chunked_loss(hidden, targets, head, _frozen(head, hidden.dtype), self.shape, self.chunk)

    def supervised(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head reads to tell the learnt tokens, (N, D), in order, and these tokens, (N,) int64."""
        targets = batch.targets.flatten()
        places = (targets != IGNORE).nonzero().squeeze(-1)
        return self.hidden(batch).flatten(0, 1)[places], targets[places]

    def told(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """The head's logits of such states, scaled and capped as the model's own are: (N, V) float32."""
        return self.shape(self.model.get_output_embeddings()(hidden_ND).float())

    def hidden(self, batch: Batch) -> torch.Tensor:
        """(rows, width, D): what the head reads."""
        return self._run(self.model.base_model, batch).last_hidden_state

    def logits(self, batch: Batch) -> torch.Tensor:
        """(rows, width, V), the model's own."""
        return self._run(self.model, batch).logits

    def _run(self, model: Any, batch: Batch) -> Any:
        """The model's outputs. Raises UserError where a packed batch did not go through our attention alone."""
        inputs = self._inputs(batch)
        if not batch.packed:
            with _told(batch):
                return model(**inputs)
        attended = Attended()
        try:
            found = model(**inputs, attended=attended)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise refusal(self.model, "its code takes no arguments of ours") from error
        attended.check(self.model)
        return found

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        if batch.packed:
            return {**inputs, "row_lengths": (*batch.lengths, batch.filler) if batch.filler else batch.lengths}
        width = batch.input_ids.shape[1]
        lengths = torch.tensor(batch.lengths, device=batch.input_ids.device)
        return {**inputs, "attention_mask": (torch.arange(width, device=lengths.device) < lengths[:, None]).long()}


@contextlib.contextmanager
def _told(batch: Batch) -> Iterator[None]:
    """Within the block PLAIN knows whether the batch is padded."""
    token = _UNPADDED.set(min(batch.lengths) == batch.input_ids.shape[1])
    try:
        yield
    finally:
        _UNPADDED.reset(token)


def logit_shape(config: Any) -> Shape:
    """How the model's own forward pass shapes its logits (Gemma 2's cap, Cohere's and Granite's scale)."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return Shape(scale, getattr(config, "final_logit_softcapping", None))


def _frozen(head: nn.Module, dtype: torch.dtype) -> torch.Tensor | None:
    """The head's matrix where it is frozen, of the hidden states' dtype, and the head is nothing but it."""
    if type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad and head.weight.dtype == dtype:
        return head.weight
    return None
