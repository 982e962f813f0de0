"""A base's weights into its skeleton: read, cast, quantised and placed one tensor at a time.

Host memory holds the filled part and the tensor at hand (for experts: one layer's), never a second copy. A quantised
base is written to the cache on the way, and read from there the next time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ftrun.errors import UserError, nearest
from ftrun.kernels.dense import is_conv1d
from ftrun.kernels.experts import GroupedExperts, is_experts
from ftrun.models.base import Base
from ftrun.models.mapping import Entry, may_be_missing, plan
from ftrun.models.packed import PackedWeight, check, packed_weights
from ftrun.models.quant.base import Quantiser, Stored
from ftrun.models.quantised import Cached, Damaged, Keeping
from ftrun.models.tensors import TensorFile
from ftrun.models.warm import Shelf

Say = Callable[[str], None]


def prepare(model: PreTrainedModel, quantiser: Quantiser, base: Base | None = None) -> list[str]:
    """Puts unfilled quantised layers in place of those that `quantiser` covers; returns their names.

    The model may be on meta, fake or real; no weight is read. base: where its files are at hand and were quantised
    before, the layers are those that the files hold quantised. Raises UserError for experts that cannot be quantised,
    and where `quant.skip` names nothing or everything.
    """
    modules = dict(model.named_modules())
    given = _packed_layers(model, base)
    heads = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    names = [
        name
        for name, module in modules.items()
        if (name in given if given is not None else id(module) not in heads and quantiser.covers(name, module))
    ]
    if given is None and quantiser.kind != "none":
        _check_skip(quantiser, modules, names)
    for name in names:
        if is_experts(modules[name]):
            _group(quantiser, name, modules[name])
        else:
            model.set_submodule(name, quantiser.empty(modules[name]))
    return names


def fill(
    model: PreTrainedModel,
    base: Base,
    quantiser: Quantiser,
    device: torch.device | str,
    cache: Path,
    say: Say,
    shelf: Shelf | None = None,
) -> None:
    """Fills the bare skeleton `model` (on meta) with the base's weights on `device`, quantised as `quantiser` says.

    shelf: keeps the weights for later models, and gives those of an earlier one where they are the same.
    Parameters keep the skeleton's dtypes and need no gradient. Raises UserError, naming the tensors, where the files
    and the model do not belong together or a quantised base is not what the job asks for.
    """
    if shelf is None:
        Filling(model, base, quantiser, torch.device(device), say).run(cache, None)
        return
    key = (*_facts(model, base, quantiser).items(), str(torch.device(device)))
    kept = shelf.of(key)
    Filling(model, base, quantiser, torch.device(device), say).run(cache, kept)
    if kept is None:
        shelf.put(key, {name: _get(model, name) for name in _layout(model)})


class Filling:
    """One run of `fill`: the model, its bare twin (shapes, dtypes, tying), and the files."""

    def __init__(
        self, model: PreTrainedModel, base: Base, quantiser: Quantiser, device: torch.device, say: Say
    ) -> None:
        self.model, self.base, self.quantiser, self.device, self.say = model, base, quantiser, device, say
        self.bare = copy.deepcopy(model)
        files = [TensorFile(path) for path in base.fetch().files or ()]
        self.where = {key: file for file in files for key in file.header}
        self.filled: set[str] = set()  # names in the bare twin

    def run(self, cache: Path, kept: Mapping[str, torch.Tensor] | None) -> None:
        """The whole way, with messages on what is read and how long it took."""
        started = time.monotonic()
        facts = _facts(self.model, self.base, self.quantiser)
        if kept is not None:
            prepare(self.model, self.quantiser, self.base)
            for name in _layout(self.model):
                self._take(name, kept[name])
            self._finish(cached=True)
            return
        packed, parts = packed_weights(self.where)
        if self.base.prequantised:
            check(packed, self.quantiser, self.base.name, self._read_plain)
        names = prepare(self.model, self.quantiser, self.base)
        if self.base.prequantised or not names:
            how = f"{self.quantiser.storage.scheme}, as the files have it" if names else "as it is"
            self._from_files(packed, parts, None)
        else:
            how = self._through_cache(Cached(cache, facts), names)
        self.say(f"{self.base.name}: {how} ({time.monotonic() - started:.1f} s)")

    def _through_cache(self, cached: Cached, names: list[str]) -> str:
        layout = _layout(self.model)
        if cached.there:
            try:
                cached.read(layout, self._take)
                self._finish(cached=True)
                return f"{self.quantiser.storage.scheme}, from the cache"
            except Damaged as damage:
                self.say(f"warning: {cached.folder}: damaged ({damage}); quantising again")
        self.say(f"{self.base.name}: quantising {len(names)} layers to {self.quantiser.storage.scheme}")
        self.filled = set()
        with Keeping(cached, layout) as keep:
            self._from_files({}, set(), keep)
            for name in keep.left:
                keep.add(name, self.model.state_dict()[name])
        if keep.failed:
            self.say(f"warning: the quantised base is not kept in {cached.folder.parent}: {keep.failed}")
        return f"quantised to {self.quantiser.storage.scheme}"

    def _from_files(self, packed: dict[str, PackedWeight], parts: set[str], keep: Keeping | None) -> None:
        entries, homeless = plan(self.bare, self.where.keys() - parts)
        if homeless:
            raise UserError(self._stray(homeless))
        expected = self.bare.state_dict()
        for entry in entries:
            if entry.sources[0][0] in packed:
                self._adopt(entry, packed[entry.sources[0][0]])
                continue
            made = entry.convert(self.bare, expected[entry.target].dtype, self._read)
            for name in list(made):
                self._place(name, made.pop(name), expected[name], entry, keep)
        self._finish()

    def _read_plain(self, key: str) -> torch.Tensor:
        return self.where[key].read(key)

    def _read(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        tensor = self._read_plain(key)
        return tensor.to(dtype) if dtype.is_floating_point else tensor

    def _adopt(self, entry: Entry, weight: PackedWeight) -> None:
        module = self.model.get_submodule(entry.target.rpartition(".")[0])
        assert isinstance(module, Stored)
        tensors = weight.tensors(self._read_plain, module.shape)
        for name, (shape, dtype) in module.storage.layout(module.shape).items():
            if tuple(tensors[name].shape) != shape or tensors[name].dtype != dtype:
                raise UserError(f"{weight.key}: {name} is {tuple(tensors[name].shape)}, expected {shape}")
        module.adopt({name: t.to(self.device) for name, t in tensors.items()})
        self.filled.add(entry.target)

    def _place(
        self, name: str, tensor: torch.Tensor, expected: torch.Tensor, entry: Entry, keep: Keeping | None
    ) -> None:
        tensor = self._with_new_rows(name, tensor, expected)
        if tensor.shape != expected.shape:
            key = entry.sources[0][0]
            raise UserError(
                f"{self.where[key].path}: {key} gives {name} the shape {list(tensor.shape)}, the model expects"
                f" {list(expected.shape)}: config.json and the weights do not belong together"
            )
        self.filled.add(name)
        stored = self._quantised(name)
        if stored is None:
            self._take(name, tensor)
            placed = [name]
        else:
            prefix, module = stored
            is_expert = prefix == name
            # the matrix of a Conv1D lies the other way round
            turned = not is_expert and is_conv1d(self.bare.get_submodule(prefix))
            module.fill(tensor.T if turned else tensor, self.device)
            placed = [f"{prefix}.{part}" for part in module.names]
        if keep is not None:
            for part in placed:
                keep.add(part, _get(self.model, part))

    def _quantised(self, name: str) -> tuple[str, Stored] | None:
        """The quantised layer that a weight of the bare model goes to: its own module, or, for experts, itself."""
        parent, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(parent)
        if isinstance(module, Stored) and leaf == "weight":
            return parent, module
        if isinstance(module, GroupedExperts) and isinstance(getattr(module, leaf), Stored):
            return name, getattr(module, leaf)
        return None

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        """Puts a tensor on the device and into the model under `name`."""
        parent, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(parent)
        tensor = tensor.to(self.device)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def _with_new_rows(self, name: str, tensor: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """Embedding and head with rows for the tokens that the job adds: each starts as the mean of the others."""
        missing = expected.shape[0] - tensor.shape[0] if tensor.dim() and expected.dim() else 0
        owner = self.bare.get_submodule(name.rpartition(".")[0])
        ends = (self.bare.get_input_embeddings(), self.bare.get_output_embeddings())
        if missing <= 0 or expected.shape[0] != self.base.rows or not any(owner is end for end in ends):
            return tensor
        mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(missing, *mean.shape[1:])])

    def _finish(self, cached: bool = False) -> None:
        """Ties, checks that nothing is missing, and computes the buffers that no file holds."""
        model, tied = self.model, self.bare.all_tied_weights_keys
        missing = set(tied) if cached else self.bare.state_dict().keys() - self.filled
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
        lost = sorted(name for name in missing if not may_be_missing(self.bare, name))
        if lost:
            raise UserError(self._lost(lost))
        _compute_buffers(model, self.device)

    def _stray(self, keys: list[str]) -> str:
        close = nearest(keys[0], self.bare.state_dict())
        hint = f" (nearest: {close})" if close else ""
        first = self.where[keys[0]].path
        return (
            f"{first}: the model has no place for {_listed(keys)}{hint}: config.json"
            f" ({self.model.config.model_type}) and the weights do not belong together"
        )

    def _lost(self, names: list[str]) -> str:
        folder = self.base.folder
        return (
            f"{folder}: the weights lack {_listed(names)}, which config.json ({self.model.config.model_type}) asks for"
        )


def _facts(model: PreTrainedModel, base: Base, quantiser: Quantiser) -> dict[str, str]:
    """What models have in common whose filled weights are the same."""
    return {"base": base.hash(), "scheme": quantiser.scheme(), "dtype": str(model.dtype), "rows": str(base.rows)}


def _layout(model: PreTrainedModel) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Every parameter and buffer of a prepared model that is saved, a tied one once."""
    tied = model.all_tied_weights_keys
    return {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items() if name not in tied}


def _packed_layers(model: PreTrainedModel, base: Base | None) -> set[str] | None:
    """The names of the layers that a base quantised before holds quantised; None for any other base."""
    if base is None or not base.prequantised or base.files is None:
        return None
    packed, parts = packed_weights(base.tensors())
    entries, _ = plan(model, base.tensors().keys() - parts)
    layers = set()
    for entry in entries:
        if entry.sources[0][0] in packed:
            if entry.converter is not None:
                raise UserError(f"{base.name}: {entry.target} is made of several tensors, quantised one by one")
            layers.add(entry.target.rpartition(".")[0])
    return layers


def _group(quantiser: Quantiser, name: str, module: nn.Module) -> None:
    try:
        quantiser.group(module)
    except ValueError as error:
        last = name.rpartition(".")[2]
        raise UserError(
            f"quant={quantiser.kind}: the experts in {name} cannot be quantised: {error}. quant.skip=[{last}] leaves"
            " them in full precision"
        ) from None


def _check_skip(quantiser: Quantiser, modules: dict[str, nn.Module], names: list[str]) -> None:
    for suffix in quantiser.options.skip:
        if not any(name == suffix or name.endswith("." + suffix) for name in modules):
            close = nearest(suffix, {name.rpartition(".")[2] for name in names})
            hint = f" Did you mean {close!r}?" if close else ""
            raise UserError(f"quant.skip: no module of this model is called {suffix!r}.{hint}")
    if not names:
        raise UserError(f"quant={quantiser.kind}: quant.skip leaves nothing to quantise; say quant=none")


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Frequencies, masks and scales that are computed, not stored: by transformers' own initialisation."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
        # GPT-2's initialisation of a block reaches for its layers' `weight`, which a quantised layer has not
        if not module._non_persistent_buffers_set and any(isinstance(child, Stored) for child in module.children()):
            module._is_hf_initialized = True  # type: ignore[assignment]
    with torch.no_grad():
        model.initialize_weights()
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, f"unfilled: {left[:5]}"


def _get(model: nn.Module, name: str) -> torch.Tensor:
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
