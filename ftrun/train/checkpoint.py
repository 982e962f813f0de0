"""Checkpoints: trained weights, optimiser state, random states and progress; safetensors and JSON only.

checkpoints/step-N/ is written aside, flushed and renamed: it is there complete, or not at all. state.json has the hash
of every other file, and commit.json that of state.json: no byte of it is unchecked.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ftrun.errors import UserError
from ftrun.optim.state import check as check_optimiser
from ftrun.runs import aside, digest, saved_steps
from ftrun.train.loop import Progress

_PARTS = ("trained", "optimiser", "random")
_STATE, _COMMIT = "state.json", "commit.json"
_FORMAT = 2  # checkpoints without one were written before there was a commit marker
_LISTS = ("recoveries", "skipped")  # of a progress; the rest are numbers


@dataclasses.dataclass
class Checkpoint:
    """What a run needs to go on as if nothing had happened. belongs: the base and the rows that it was made from;
    files: the run's own records at that step, by name."""

    progress: Progress
    trained: dict[str, torch.Tensor]
    optimiser: dict[str, torch.Tensor]
    optimiser_meta: dict[str, Any]
    random: dict[str, torch.Tensor]
    belongs: dict[str, str] = dataclasses.field(default_factory=dict)
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)


def copied(checkpoint: Checkpoint) -> Checkpoint:
    """The same with tensors of its own on the host, so that training may go on while it is written."""
    parts = {part: {name: t.detach().cpu().clone() for name, t in getattr(checkpoint, part).items()} for part in _PARTS}
    return dataclasses.replace(checkpoint, progress=copy.deepcopy(checkpoint.progress), **parts)


def save(folder: Path, checkpoint: Checkpoint, name: str | None = None, last: int = 2) -> Path:
    """Write step-N/ (or `name`/) under `folder` and drop all but the newest `last` steps; returns its path.

    Raises OSError or SafetensorError where it cannot be written; what was there is then as it was.
    """
    here = checkpoint.progress.step
    target = folder / (name or f"step-{here}")
    with aside(target) as beside:
        beside.mkdir(parents=True)
        for part in _PARTS:
            save_file(_packed(getattr(checkpoint, part)), beside / f"{part}.safetensors")
        for file, content in checkpoint.files.items():
            (beside / file).write_bytes(content)
        state = {
            "format": _FORMAT,
            "progress": dataclasses.asdict(checkpoint.progress),
            "belongs": checkpoint.belongs,
            "files": {path.name: digest(path) for path in sorted(beside.iterdir())},
            "optimiser": checkpoint.optimiser_meta,
        }
        (beside / _STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        commit(beside)
    # those of later steps were passed over as damaged: they do not count as the newest
    for old in [step for step in saved_steps(folder) if step <= here][:-last]:
        shutil.rmtree(folder / f"step-{old}", ignore_errors=True)
    return target


def latest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none; `say` hears of those passed over.

    Raises UserError that names the newest one's damage where none is whole.
    """
    damage: list[UserError] = []
    for step in reversed(saved_steps(folder)):
        try:
            found = load(folder / f"step-{step}")
        except UserError as error:
            damage.append(error)
            continue
        for one in damage:
            say(f"warning: {one}; step-{step} is taken instead")
        return found
    if damage:
        raise UserError(f"{damage[0]}. No other is whole: name another out, or remove {folder} to begin anew")
    return None


def mark(folder: Path, step: int) -> str:
    """SHA-256 that stands for all of a step's checkpoint: of its state.json, which holds the files'. Raises OSError."""
    return digest(folder / f"step-{step}" / _STATE)


def commit(folder: Path) -> None:
    """The marker of a checkpoint that is written to its end: the hash of its state.json."""
    (folder / _COMMIT).write_text(_marker(folder), encoding="utf-8")


def _marker(folder: Path) -> str:
    return json.dumps({_STATE: digest(folder / _STATE)})


def load(path: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises UserError that names the file where one is damaged."""
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        files = _checked(path, state)
        parts = {part: load_file(path / f"{part}.safetensors") for part in _PARTS}
        progress = _progress(state["progress"], path.name)
        check_optimiser(parts["optimiser"], state["optimiser"])
        generators = [parts["random"]["cpu"], *(t for n, t in parts["random"].items() if n.startswith("cpu@"))]
        if any(state.shape != torch.get_rng_state().shape for state in generators):
            raise ValueError("random.safetensors holds no generator's state")
        belongs = dict(state.get("belongs") or {})
        if not all(isinstance(digest, str) for digest in belongs.values()):
            raise ValueError("state.json names nothing that it belongs to")
        return Checkpoint(progress, optimiser_meta=state["optimiser"], belongs=belongs, files=files, **parts)
    except KeyError as error:
        raise UserError(f"{path}: the checkpoint is damaged: it lacks {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path}: the checkpoint is damaged: {error}") from error


def _checked(path: Path, state: Mapping[str, Any]) -> dict[str, bytes]:
    """The run's records in a checkpoint, all of whose files are what was saved."""
    old = "format" not in state and not (path / _COMMIT).exists()
    if not old and (path / _COMMIT).read_bytes() != _marker(path).encode():
        raise ValueError(f"{_STATE} is not what was saved")
    hashes = state.get("files", {}) if old else state["files"]
    for name, expected in hashes.items():
        if digest(path / name) != expected:
            raise ValueError(f"{name} is not what was saved")
    tensors = {f"{part}.safetensors" for part in _PARTS}
    if not old and not tensors <= hashes.keys():
        raise ValueError(f"{_STATE} has no hash of its tensors")
    return {name: (path / name).read_bytes() for name in hashes if name not in tensors}


def _progress(values: Mapping[str, Any], name: str) -> Progress:
    """The progress in state.json, which must be that of the folder's name."""
    progress = Progress(**values)
    numbers = [getattr(progress, f.name) for f in dataclasses.fields(progress) if f.name not in _LISTS]
    sound = isinstance(progress.skipped, list) and isinstance(progress.recoveries, list)
    sound = sound and all(isinstance(n, int) for n in progress.skipped)
    sound = sound and all(isinstance(n, int) for one in progress.recoveries for n in dict(one).values())
    sound = sound and all({"step", "micro_batch", "recomputed"} == one.keys() for one in progress.recoveries)
    sound = sound and all(n is None or isinstance(n, int | float) for n in numbers)
    if not sound or not isinstance(progress.step, int):
        raise ValueError("state.json holds no progress")
    if re.fullmatch(r"step-\d+", name) and name != f"step-{progress.step}":
        raise ValueError(f"it is that of step {progress.step}")
    return progress


def _packed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, each with memory of its own: a tied weight with two names is written twice, as an adapter has it."""
    made: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().contiguous().cpu()
        made[name] = own.clone() if own.data_ptr() in seen else own
        seen.add(own.data_ptr())
    return made
