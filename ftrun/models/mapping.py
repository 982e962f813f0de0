"""From the names in a checkpoint to the names in a model, by transformers' own rules, one tensor at a time.

Checkpoints keep older names (`gamma`, a prefix more or less) and other shapes (one tensor an expert where the model
has one for all). transformers lists the renamings and conversions of each family; they are applied here as its
`convert_and_load_state_dict_in_model` does, but each conversion reads its sources only when its turn comes.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ftrun.errors import UserError

Read = Callable[[str, torch.dtype], torch.Tensor]


@dataclass
class Entry:
    """One or more tensors of the checkpoint that become one or more of the model; `target` is the first of these."""

    target: str
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)  # the name in the checkpoint, the pattern it met

    def convert(self, model: PreTrainedModel, dtype: torch.dtype, read: Read) -> dict[str, torch.Tensor]:
        """The model's tensors by name. `model` is a bare skeleton. Raises UserError where the sources do not fit."""
        if self.converter is None:
            return {self.target: read(self.sources[0][0], dtype)}
        converter = copy.deepcopy(self.converter)
        for key, pattern in self.sources:
            converter.add_tensor(self.target, key, pattern, functools.partial(read, key, dtype))  # type: ignore[arg-type]
        try:
            made = converter.convert(self.target, model=model, config=model.config)
        except (RuntimeError, ValueError, IndexError) as error:
            found = ", ".join(key for key, _ in self.sources[:3])
            raise UserError(f"{self.target}: cannot be made of {found}, …: {error}") from error
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def plan(model: PreTrainedModel, keys: Iterable[str]) -> tuple[list[Entry], list[str]]:
    """(what to read, in the model's order; the keys that the model has no place for). `model` is a bare skeleton."""
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix, names = model.base_model_prefix, dict(model.state_dict())
    found: dict[str, Entry] = {}
    homeless = []
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and key in names:
            name, pattern = rename_source_key(key, [], [], prefix, names)
        if name not in names:
            homeless.append(key)
            continue
        entry = found.setdefault(name, Entry(name, by_pattern[pattern] if pattern else None))
        entry.sources.append((key, pattern or key))
    return list(found.values()), [key for key in homeless if not _ignored(model, key)]


def may_be_missing(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers lets a checkpoint of this family go without the tensor."""
    return any(re.search(p, name) for p in model._keys_to_ignore_on_load_missing or ())


def _ignored(model: PreTrainedModel, key: str) -> bool:
    patterns: set[Any] = set(model._keys_to_ignore_on_load_unexpected or ())
    # buffers that older versions of transformers saved
    patterns |= {
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
        r"\.attn\.(masked_)?bias$",
        r"\.attention\.(masked_)?bias$",
    }
    return any(re.search(p, key) for p in patterns)
