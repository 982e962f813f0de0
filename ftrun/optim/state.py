"""An optimiser's state as tensors and JSON, and back, bit for bit. Nothing is pickled.

Hyper-parameters stay out: they belong to the job, which makes the optimiser anew before its state is restored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

_PAGED = ("state1", "state2")
_META = {"groups": list, "shapes": list, "state": dict}


def flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of the state, by "INDEX.KEY", on the CPU, and the rest as JSON-able values.

    Tensors on the CPU are the optimiser's own, not copies: write them before the next step. A tensor that several
    parameters share (bitsandbytes' quantisation map) comes once, and the others name it.
    """
    if getattr(optimizer, "is_paged", False) and torch.cuda.is_available():
        torch.cuda.synchronize()  # paged updates run on while Python goes ahead
    tensors: dict[str, torch.Tensor] = {}
    owners: dict[int, str] = {}
    meta: dict[str, Any] = {"groups": [len(g["params"]) for g in optimizer.param_groups], "shapes": [], "state": {}}
    for index, parameter in enumerate(_parameters(optimizer)):
        meta["shapes"].append(list(parameter.shape))
        entry = meta["state"].setdefault(str(index), {}) if parameter in optimizer.state else {}
        for key, value in optimizer.state.get(parameter, {}).items():
            name = f"{index}.{key}"
            if not isinstance(value, torch.Tensor):
                entry[key] = {"value": value}
                continue
            entry[key] = {"tensor": owners.setdefault(id(value), name)}
            if owners[id(value)] == name:
                tensors[name] = value.detach().cpu().contiguous()
    return tensors, meta


def restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Give a fresh optimiser the state that `flatten` took: its next step is then the same, bit for bit.

    Raises ValueError where the optimiser's groups or parameters differ from those that were saved.
    """
    parameters = list(_parameters(optimizer))
    groups = [len(g["params"]) for g in optimizer.param_groups]
    shapes = [list(p.shape) for p in parameters]
    check(tensors, meta)
    if groups != meta["groups"] or shapes != meta["shapes"]:
        raise ValueError(
            f"the saved optimiser state is of {len(meta['shapes'])} tensors in groups of {meta['groups']}, "
            f"this optimiser has {len(shapes)} in groups of {groups}, or their shapes differ"
        )
    shared: dict[tuple[str, torch.device], torch.Tensor] = {}
    optimizer.state.clear()
    for index, entry in meta["state"].items():
        parameter = parameters[int(index)]
        for key, saved in entry.items():
            optimizer.state[parameter][key] = saved.get("value")
            if "tensor" in saved:
                tensor = tensors[saved["tensor"]]
                place = (saved["tensor"], parameter.device)
                optimizer.state[parameter][key] = shared.setdefault(place, _placed(optimizer, parameter, key, tensor))


def of_all(each: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Several ranks' tensors as one mapping: the first one's by their names, the others' by "NAME@RANK"."""
    return {f"{n}@{rank}" if rank else n: t for rank, tensors in enumerate(each) for n, t in tensors.items()}


def of_rank(tensors: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """One rank's tensors of what `of_all` gave."""
    named = {name: name.partition("@") for name in tensors}
    return {name: tensors[full] for full, (name, _, own) in named.items() if (own or "0") == str(rank)}


def check(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Raises ValueError where these are not, all of them, what `flatten` gave, on one rank or on each of several."""
    for rank, own in enumerate(meta.get("ranks", ())):
        if not isinstance(own, dict) or "ranks" in own:
            raise ValueError(f"the optimiser's state of rank {rank} is none")
        check(of_rank(tensors, rank), own)
    if not all(isinstance(meta.get(key), kind) for key, kind in _META.items()):
        raise ValueError(f"the optimiser's state has not all of {', '.join(_META)}")
    for index, entry in meta["state"].items():
        if not index.isdigit() or int(index) >= len(meta["shapes"]) or not isinstance(entry, dict):
            raise ValueError(f"the optimiser's state holds an entry {index!r}")
        for key, saved in entry.items():
            if not isinstance(saved, dict) or ("tensor" in saved and saved["tensor"] not in tensors):
                raise ValueError(f"the optimiser's tensor {index}.{key} is missing")


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _placed(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` where the optimiser would have made it: its parameter's device, or paged memory."""
    if key in _PAGED and getattr(optimizer, "is_paged", False) and parameter.is_cuda:
        buffer = optimizer.get_state_buffer(parameter, dtype=tensor.dtype)  # type: ignore[attr-defined]
        buffer.copy_(tensor)
        torch.cuda.synchronize()
        return buffer
    # fused and capturable optimisers keep their step counters beside the weights, the others on the CPU
    stays = key == "step" and not any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
    return tensor.clone() if stays else tensor.to(parameter.device, copy=True)
