"""A model's folder: its config.json and its safetensors files, each checked before anything is built on it.

Nothing here reads a tensor: a safetensors file begins with the length of a JSON header (8 bytes, little-endian),
and the header says where each tensor lies, so that a damaged or cut file is known at once.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ftrun.errors import UserError, nearest

_HEADER_LIMIT = 100_000_000  # bytes; what safetensors itself accepts
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_INDEX = "model.safetensors.index.json"


def read_facts(folder: Path) -> dict[str, Any]:
    """The folder's config.json as it stands. Raises UserError if it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json{_instead(folder)}")
    return _json(path)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The folder's safetensors files in order, each with a sound header and holding what the index says.

    Raises UserError if there are none, if they are pickled, if a shard is missing, or if a file is damaged.
    """
    index = folder / _INDEX
    if index.is_file():
        return _indexed(index)
    single = folder / "model.safetensors"
    if single.is_file():
        read_header(single)
        return (single,)
    raise UserError(f"{folder}: no weights{_instead(folder)}")


def tensor_files(files: Iterable[Path]) -> dict[str, Path]:
    """The name of each stored tensor, and the file that holds it."""
    return {name: path for path in files for name in read_header(path)}


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape, data_offsets} of each tensor in a safetensors file. Raises UserError if it is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise UserError(f"{path}: damaged, or no safetensors file ({size} bytes)")
        text = file.read(length)
    try:
        header = json.loads(text)
        json.dumps(header, ensure_ascii=False).encode()  # half a surrogate pair can be neither printed nor hashed
        tensors = {k: v for k, v in header.items() if k != "__metadata__"}
        end = _end(tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: its header is damaged; fetch the file again") from None
    if 8 + length + end != size:
        raise UserError(f"{path}: {size} bytes, its header says {8 + length + end}: cut short or damaged")
    return tensors


def _end(tensors: dict[str, dict[str, Any]]) -> int:
    """Where the last tensor ends. Raises ValueError, KeyError or TypeError where an entry is none, or two overlap."""
    end = 0
    for entry in sorted(tensors.values(), key=lambda v: v["data_offsets"]):
        begin, after = entry["data_offsets"]
        numbers = [begin, after, *entry["shape"]]
        if not isinstance(entry["dtype"], str) or any(type(n) is not int or n < 0 for n in numbers):
            raise TypeError
        if begin < end or after < begin:
            raise ValueError
        end = after
    return end


def _indexed(index: Path) -> tuple[Path, ...]:
    """The shards that the index names, checked against it."""
    where = _json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index}: no weight_map in it")
    strange = next((s for s in where.values() if not isinstance(s, str) or Path(s).name != s), None)
    if strange is not None:
        raise UserError(f"{index}: found {strange!r}, expected the names of files beside it")
    held: dict[str, set[str]] = {}
    for shard in sorted(set(where.values())):
        path = index.parent / shard
        if not path.is_file():
            lost = sum(file == shard for file in where.values())
            raise UserError(f"{path}: missing; {_INDEX} says that it holds {lost} of {len(where)} tensors")
        held[shard] = set(read_header(path))
    for name, shard in where.items():
        if name not in held[shard]:
            raise UserError(f"{index.parent / shard}: the tensor {name} is not in it, though {_INDEX} says so")
    return tuple(index.parent / shard for shard in held)


def _json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(facts, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(facts).__name__}")
    return facts


def _instead(folder: Path) -> str:
    """What the folder holds in place of what was sought, and what to do about it."""
    names = sorted(p.name for p in folder.iterdir())
    if "adapter_config.json" in names:
        return ": it holds an adapter, not a base model. To start from it: method.from=" + str(folder)
    pickled = [n for n in names if n.endswith(_PICKLED)]
    if pickled:
        return (
            f" in safetensors: {pickled[0]} is a pickle, which can run code when it is read, so ftrun never reads one."
            " Convert it where you trust it: transformers' AutoModelForCausalLM.from_pretrained(DIR)"
            '.save_pretrained("NEW"), then copy the tokenizer\'s files'
        )
    if gguf := [n for n in names if n.endswith(".gguf")]:
        return f": {gguf[0]} is a GGUF file; ftrun reads safetensors (GGUF only for the embedded default)"
    found = nearest("model.safetensors", [n for n in names if n.endswith(".safetensors")])
    if found:
        return f": expected model.safetensors or {_INDEX}, found {found}"
    shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
    return f": expected config.json, model.safetensors and the tokenizer's files, found {shown or 'an empty folder'}"
