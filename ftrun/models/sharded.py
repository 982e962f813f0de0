"""A transformers checkpoint, written tensor by tensor: safetensors in shards, their index, config and tokenizer.

Memory holds one tensor at a time: the layout of every shard is known from shapes alone before the first byte.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ftrun.models.base import Base
from ftrun.models.tensors import Layout, Writer

_INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def filed(bare: PreTrainedModel, name: str, tensor: torch.Tensor) -> Tensors:
    """A tensor of the model as the family's checkpoints have it: other names, and experts one by one."""
    return dict(revert_weight_conversion(bare, {name: tensor}))


def layout_of(bare: PreTrainedModel, names: Iterable[str], dtype: torch.dtype) -> dict[str, Layout]:
    """What `filed` gives for each of the model's tensors: name -> {name in the file: (shape, dtype)}.

    dtype: of whatever is a floating-point number.
    """
    state = bare.state_dict()
    found: dict[str, Layout] = {}
    for name in names:
        own = state[name].dtype
        like = torch.empty(state[name].shape, dtype=dtype if own.is_floating_point else own, device="meta")
        found[name] = {key: (tuple(t.shape), t.dtype) for key, t in filed(bare, name, like).items()}
    return found


def write_shards(
    folder: Path, layouts: Mapping[str, Layout], limit: float, make: Callable[[str], Tensors]
) -> list[Path]:
    """The weights of a checkpoint into `folder`, in shards of `limit` bytes at most (a larger tensor is one alone).

    layouts: name -> what `make(name)` will give; it is asked once for each, in order. Returns the files.
    """
    shards = _shards({key: facts for layout in layouts.values() for key, facts in layout.items()}, limit)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    where = {key: i for i, shard in enumerate(shards) for key in shard}
    writers = [Writer(folder / name, shard, {"format": "pt"}) for name, shard in zip(names, shards, strict=True)]
    try:
        for name in layouts:
            for key, tensor in make(name).items():
                writers[where[key]].add(key, tensor)
    finally:
        for writer in writers:
            writer.close()
    assert not any(writer.left for writer in writers)
    if len(shards) > 1:
        size = sum(_size(facts) for shard in shards for facts in shard.values())
        index = {"metadata": {"total_size": size}, "weight_map": {key: names[i] for key, i in sorted(where.items())}}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def write_facts(
    folder: Path, base: Base, architecture: str, dtype: torch.dtype, tied: bool, quantised: Mapping[str, Any] | None
) -> None:
    """All but the weights: config.json, generation_config.json, the tokenizer's files with the chat template, and the
    model's own code where it runs on such.

    tied: whether head and embedding are one tensor. quantised: config.json's quantization_config, None where plain.
    """
    config = copy.deepcopy(base.config)
    config.get_text_config().vocab_size = base.rows
    config.dtype, config.architectures, config.tie_word_embeddings = dtype, [architecture], tied
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if quantised:
        config.quantization_config = dict(quantised)
    config.save_pretrained(folder)
    base.tokenizer().save_pretrained(folder)
    assert base.folder is not None
    generation = base.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    for code in base.folder.glob("*.py") if base.options.trust_remote_code else ():
        shutil.copyfile(code, folder / code.name)


def _shards(layout: Layout, limit: float) -> list[dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """The tensors in order, cut where a shard would grow beyond `limit` bytes."""
    found: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    filled = 0
    for key, facts in layout.items():
        size = _size(facts)
        if found[-1] and filled + size > limit:
            found.append({})
            filled = 0
        found[-1][key] = facts
        filled += size
    return found


def _size(facts: tuple[tuple[int, ...], torch.dtype]) -> int:
    return math.prod(facts[0]) * facts[1].itemsize
