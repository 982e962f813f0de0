"""A tuned model as one plain checkpoint: what each target makes of the merged weights, its cost, its files.

The three targets over a quantised base: its own weights ("base"), the ones that training saw ("dequantised"), and
those quantised again ("requantised").
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftrun import stepping
from ftrun.errors import UserError
from ftrun.evals.held_out import evaluate
from ftrun.methods.base import Wrapper
from ftrun.methods.merging import Loss, losses, merged_tensor, tied
from ftrun.models.packed import as_packed, packed_layout
from ftrun.models.quant.base import QuantisedExperts, QuantisedLinear
from ftrun.models.quant.four_bit import FourBit
from ftrun.models.sharded import Tensors, filed, layout_of, write_facts, write_shards
from ftrun.models.skeleton import skeleton
from ftrun.models.tensors import Layout
from ftrun.tasks.tuned import Tuned

_LOGIT_ROWS, _LOGIT_TOKENS = 8, 64  # rows whose logits are compared, and supervised tokens of each at most


@dataclass(frozen=True)
class Measured:
    """Held-out loss in nats a token, and logits (tokens, V) in float32 on the first rows; None without such rows."""

    loss: float | None
    logits: torch.Tensor | None


def measure(tuned: Tuned, rows: int | None) -> Measured:
    """The model as it stands, on the run's held-out rows."""
    batches = tuned.held_out(rows)
    if not batches:
        return Measured(None, None)
    loss = evaluate(tuned.model, tuned.loss, batches, 0).loss
    found = []
    with torch.no_grad(), tuned.autocast():
        alone = stepping.evaluation_batches(tuned.job, tuned.corpus, _LOGIT_ROWS, 1, tuned.pad_id)
        for batch in (one.to(tuned.device) for one in alone):
            logits = tuned.token_loss.logits(batch).flatten(0, 1)
            found.append(logits[batch.learnt[:_LOGIT_TOKENS]].float().cpu())  # type: ignore[index]
    return Measured(loss, torch.cat(found))


def drift(apart: Measured, merged: Measured) -> dict[str, float | None]:
    """What merging changed. logits: the largest difference, as a share of the largest logit unmerged. kl: the mean
    Kullback-Leibler divergence of the next token, in nats. loss, and its rise over the unmerged model's.
    """
    if apart.loss is None or merged.loss is None or apart.logits is None or merged.logits is None:
        return dict.fromkeys(("loss", "loss_rise", "logits", "kl"))
    far = float((merged.logits - apart.logits).abs().max() / apart.logits.abs().max())
    was, now = apart.logits.log_softmax(-1), merged.logits.log_softmax(-1)
    kl = float((was.exp() * (was - now)).sum(-1).mean())
    return {"loss": merged.loss, "loss_rise": merged.loss - apart.loss, "logits": far, "kl": max(kl, 0.0)}


class Output:
    """One target for one opened run. dtype: of the plain weights in the file.

    Raises UserError where the target cannot hold this model.
    """

    def __init__(self, tuned: Tuned, into: str, dtype: torch.dtype) -> None:
        self.tuned, self.into, self.dtype, self.model = tuned, into, dtype, tuned.model
        self.bare: Any = skeleton(tuned.parts.base)
        self.storage = self._storage() if into == "requantised" else None

    def _storage(self) -> FourBit:
        """The scheme as bitsandbytes stores it."""
        storage = self.tuned.parts.quantiser.storage
        if not isinstance(storage, FourBit):
            raise UserError(
                f"into=requantised: bitsandbytes has no checkpoint of {storage.scheme} that computes as the run did; "
                "into=base and into=dequantised write plain weights"
            )
        if any(isinstance(module, QuantisedExperts) for module in self.model.modules()):
            raise UserError(
                "into=requantised: transformers keeps a layer's experts as one tensor, which bitsandbytes does not "
                "quantise; into=base and into=dequantised write plain weights"
            )
        return storage

    # --- what it costs ---

    def losses(self) -> dict[str, Loss]:
        """What rounding to this target loses of each wrapped module's update."""
        return dict(losses(self.model, self._rounded))

    def _rounded(self, wrapper: Wrapper, weight: torch.Tensor) -> torch.Tensor:
        if self.storage is None or not isinstance(wrapper.base, QuantisedLinear):
            return weight.to(self.dtype).float()
        stored = self.storage.quantise(weight)
        return self.storage.dequantise([stored[n] for n in wrapper.base.names], wrapper.base.shape, torch.float32)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model holds what the file will, computing in the run's own dtype; then the very tensors
        that it held before.
        """
        self.tuned.tuner.merge(self.model, self._layer)
        own = {p: p.data for p in self.model.parameters()}
        try:
            for p, data in own.items():
                if data.dtype != self.dtype:
                    p.data = data.to(self.dtype).to(data.dtype)
            yield
        finally:
            for p, data in own.items():
                p.data = data
            self.tuned.tuner.unmerge(self.model)

    def _layer(self, wrapper: Wrapper) -> nn.Module:
        old = wrapper.base
        if self.storage is None or not isinstance(old, QuantisedLinear):
            return wrapper.merged()
        made = QuantisedLinear(self.storage, old.shape, wrapper.base.bias, old.weight_dtype, torch.device("meta"))
        made.adopt(self.storage.quantise(wrapper.merged_weight()))
        return made

    # --- the files ---

    def write(self, folder: Path, limit: float) -> list[Path]:
        """The whole checkpoint into `folder`, which exists; returns the weights' files."""
        base, name = self.tuned.parts.base, type(self.bare).__name__
        write_facts(folder, base, name, self.dtype, self.tied, self._quantisation())
        return write_shards(folder, self._layouts(), limit, self._make)

    @property
    def tied(self) -> bool:
        return tied(self.model)

    def _names(self) -> list[str]:
        """The bare model's tensors that are filed: of a tied pair one."""
        left_out = set(self.bare.all_tied_weights_keys) if self.tied else set()
        left_out |= set(self.bare._keys_to_ignore_on_save or ())
        return [name for name in self.bare.state_dict() if name not in left_out]

    def _layouts(self) -> dict[str, Layout]:
        found = layout_of(self.bare, self._names(), self.dtype)
        for name, layout in found.items():
            layer = self._packed(name)
            if layer is not None and self.storage is not None:
                if len(layout) != 1:
                    raise UserError(f"into=requantised: {name} is several tensors in this family's checkpoints")
                found[name] = packed_layout(next(iter(layout)), self.storage, layer.shape)
        return found

    def _make(self, name: str) -> Tensors:
        """A tensor of the bare model as the file has it."""
        layer = self._packed(name)
        if layer is None or self.storage is None:
            tensor = merged_tensor(self.model, self.bare, name)
            tensor = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            return filed(self.bare, name, tensor.contiguous())
        held = self.model.get_submodule(name.rpartition(".")[0])
        stored = {part: getattr(layer, part) for part in layer.names}
        if isinstance(held, Wrapper):
            stored = self.storage.quantise(held.merged_weight())
        key = next(iter(filed(self.bare, name, torch.empty(0, device="meta"))))
        return as_packed(key, self.storage, stored, layer.shape, self.dtype)

    def _packed(self, name: str) -> QuantisedLinear | None:
        """The layer that keeps this tensor packed in the file too."""
        parent, _, leaf = name.rpartition(".")
        held = self.model.get_submodule(parent) if leaf == "weight" and self.storage is not None else None
        held = held.base if isinstance(held, Wrapper) else held
        return held if isinstance(held, QuantisedLinear) else None

    def _quantisation(self) -> dict[str, Any] | None:
        """config.json's quantization_config: what bitsandbytes made, and which linear layers it did not."""
        if self.storage is None:
            return None
        from transformers import BitsAndBytesConfig

        plain = [
            name
            for name, module in self.bare.named_modules()
            if name and not any(module.children()) and self._packed(f"{name}.weight") is None and _linear(module)
        ]
        made = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.storage.kind,
            bnb_4bit_use_double_quant=self.storage.double_quant,
            bnb_4bit_compute_dtype=self.dtype,
            llm_int8_skip_modules=plain,
        )
        return dict(made.to_dict())


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
