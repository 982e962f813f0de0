"""Bases that bitsandbytes quantised before: their stored 4-bit tensors, taken as they are.

Beside `….weight` (packed bytes) lie `….weight.absmax`, `.quant_map`, with double quantisation `.nested_absmax` and
`.nested_quant_map`, and `.quant_state.bitsandbytes__nf4` (or fp4): a JSON object in bytes with blocksize,
shape, dtype, nested_blocksize and nested_offset (bitsandbytes, QuantState.as_dict).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ftrun.errors import UserError
from ftrun.kernels import blockwise
from ftrun.models.quant.base import Quantiser
from ftrun.models.quant.four_bit import FourBit

_STATE = ".quant_state.bitsandbytes__"
_STATE_BYTES = 512  # of that object, filled up with spaces: its length must not depend on a number in it
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class PackedWeight:
    """One weight of the checkpoint: `key` names its bytes, `kind` is nf4 or fp4."""

    key: str
    kind: str

    def state(self, read: Read) -> dict[str, Any]:
        """What bitsandbytes wrote beside the tensors."""
        text = bytes(read(f"{self.key}{_STATE}{self.kind}").tolist())
        try:
            return dict(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.key}{_STATE}{self.kind}: damaged: {error}") from None

    def storage(self, read: Read) -> FourBit:
        """The scheme it is stored in. Raises UserError where bitsandbytes wrote one that is not known here."""
        state = self.state(read)
        nested = state.get("nested_blocksize")
        if nested not in (None, blockwise.NESTED_BLOCK):
            raise UserError(f"{self.key}: its constants are in blocks of {nested}, expected {blockwise.NESTED_BLOCK}")
        return FourBit(self.kind, int(state["blocksize"]), nested is not None)

    def tensors(self, read: Read, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The stored tensors under our names, for a weight of `shape`."""
        state = self.state(read)
        if tuple(state["shape"]) != shape:
            raise UserError(f"{self.key}: its shape is {state['shape']}, expected {list(shape)}")
        self._same_map(read(f"{self.key}.quant_map"), torch.tensor(blockwise.CODES[self.kind]))
        found = {"packed": read(self.key).view(torch.uint8).reshape(-1, 1), "absmax": read(f"{self.key}.absmax")}
        if "nested_offset" not in state:
            return found
        self._same_map(read(f"{self.key}.nested_quant_map"), blockwise.dynamic_map(torch.device("cpu")))
        offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32)
        return found | {"nested_absmax": read(f"{self.key}.nested_absmax"), "offset": offset}

    def _same_map(self, found: torch.Tensor, known: torch.Tensor) -> None:
        if not torch.equal(found.float(), known):
            raise UserError(f"{self.key}: it was quantised with another map of code points than bitsandbytes' own")


def packed_layout(key: str, storage: FourBit, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What `as_packed` gives for a weight of `shape`: name -> (shape, dtype)."""
    found = {_named(key, name): facts for name, facts in storage.layout(shape).items() if name != "offset"}
    found[f"{key}.quant_map"] = ((16,), torch.float32)
    if storage.double_quant:
        found[f"{key}.nested_quant_map"] = ((256,), torch.float32)
    return found | {f"{key}{_STATE}{storage.kind}": ((_STATE_BYTES,), torch.uint8)}


def as_packed(
    key: str, storage: FourBit, stored: dict[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A stored weight as bitsandbytes files it. key: the weight's name. dtype: what it is dequantised to."""
    facts: dict[str, Any] = {"quant_type": storage.kind, "blocksize": storage.block_size, "shape": list(shape)}
    facts["dtype"] = str(dtype).removeprefix("torch.")
    found = {_named(key, name): tensor for name, tensor in stored.items() if name != "offset"}
    found[f"{key}.quant_map"] = torch.tensor(blockwise.CODES[storage.kind])
    if storage.double_quant:
        facts |= {"nested_blocksize": blockwise.NESTED_BLOCK, "nested_dtype": "float32"}
        facts["nested_offset"] = float(stored["offset"])
        found[f"{key}.nested_quant_map"] = blockwise.dynamic_map(torch.device("cpu"))
    text = json.dumps(facts).encode().ljust(_STATE_BYTES)
    return found | {f"{key}{_STATE}{storage.kind}": torch.tensor(list(text), dtype=torch.uint8)}


def _named(key: str, name: str) -> str:
    return key if name == "packed" else f"{key}.{name}"


def packed_weights(keys: Iterable[str]) -> tuple[dict[str, PackedWeight], set[str]]:
    """(the quantised weights by their key, the keys that belong to them beside the weight)."""
    keys = set(keys)
    states = [key for key in keys if _STATE in key]
    weights = {key.split(_STATE)[0]: PackedWeight(*key.split(_STATE)) for key in states}
    return weights, {*states, *(w + part for w in weights for part in _PARTS if w + part in keys)}


def check(weights: dict[str, PackedWeight], quantiser: Quantiser, name: str, read: Read) -> None:
    """Raises UserError unless the job asks for what the checkpoint holds; one weight speaks for all."""
    if not weights:
        raise UserError(f"{name}: config.json says that it is quantised, but no weight of it is")
    stored = next(iter(weights.values())).storage(read)
    if getattr(quantiser, "storage", None) != stored:
        double = str(stored.double_quant).lower()
        raise UserError(
            f"quant={quantiser.kind}: the weights of {name} are stored as {stored.scheme} already and are taken as they"
            f" are: say quant={stored.kind} quant.block_size={stored.block_size} quant.double_quant={double}"
        )
    if quantiser.options.skip:
        raise UserError(f"quant.skip: which weights of {name} are quantised was decided when it was made; leave it []")
