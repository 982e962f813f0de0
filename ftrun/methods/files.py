"""An adapter's folder: adapter_config.json and adapter_model.safetensors, as PEFT writes and reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ftrun.errors import UserError
from ftrun.runs import digest

_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int8: "I8"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes both files into `folder`, which is made where it is missing. Tensors may lie on any device and share
    storage: each is written in full, in its own dtype.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(own, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def file_size(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the file that `save_adapter` would write; the tensors may be on meta.

    The format (safetensors): 8 bytes, a JSON header filled up to a multiple of 8, the bytes of the tensors, those of
    the widest dtypes first, then by name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        kind = _KINDS[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    size = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + size + -size % 8 + end


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each safetensors file that lies in the folder, by its name."""
    return {path.name: digest(path) for path in sorted(folder.glob("*.safetensors"))}


def load_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The folder's config and its tensors, on the CPU. Raises UserError where it holds no safe, whole adapter."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one with {CONFIG} and {WEIGHTS}")
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").exists():
            raise UserError(
                f"{folder}: holds adapter_model.bin, a pickle, which is never read: loading one can run any code. "
                f"Save the adapter again as {WEIGHTS} (PEFT: save_pretrained)"
            )
        raise UserError(f"{folder}: holds no {WEIGHTS}")
    return _config(folder / CONFIG), _tensors(folder / WEIGHTS)


def peft_targets(selected: Iterable[str], every: Iterable[str]) -> list[str]:
    """The shortest target_modules that make PEFT choose exactly the `selected` of `every` module name.

    Last components ("q_proj") where they fit no other module, as servers expect them; full names otherwise.
    """
    names = set(selected)
    leaves = sorted({name.rpartition(".")[2] for name in names})
    fitting = {name for name in every if name.rpartition(".")[2] in leaves}
    return leaves if fitting == names else sorted(names)


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent}: holds no {path.name}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or cut short: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
