"""Checkpoints: trained weights, optimiser state, random states and progress; safetensors and JSON only.

checkpoints/step-N/ is written aside, flushed and renamed: it is there complete, or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ftrun.errors import UserError
from ftrun.runs import aside
from ftrun.train.loop import Progress

KEPT = 2


@dataclasses.dataclass
class Checkpoint:
    """What a run needs to go on as if nothing had happened."""

    progress: Progress
    trained: dict[str, torch.Tensor]
    optimiser: dict[str, torch.Tensor]
    optimiser_meta: dict[str, Any]
    random: dict[str, torch.Tensor]


def save(folder: Path, checkpoint: Checkpoint, name: str | None = None) -> Path:
    """Write step-N/ (or `name`/) under `folder` and drop all but the newest KEPT steps; returns its path."""
    target = folder / (name or f"step-{checkpoint.progress.step}")
    shutil.rmtree(target, ignore_errors=True)
    with aside(target) as beside:
        beside.mkdir(parents=True)
        for part in ("trained", "optimiser", "random"):
            save_file(_packed(getattr(checkpoint, part)), beside / f"{part}.safetensors")
        state = {"progress": dataclasses.asdict(checkpoint.progress), "optimiser": checkpoint.optimiser_meta}
        (beside / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    for old in steps(folder)[:-KEPT]:
        shutil.rmtree(folder / f"step-{old}", ignore_errors=True)
    return target


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, lowest first."""
    found = (re.fullmatch(r"step-(\d+)", p.name) for p in folder.glob("step-*"))
    return sorted(int(m.group(1)) for m in found if m)


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, or None where there is none. Raises UserError that names a damaged file."""
    found = steps(folder)
    return load(folder / f"step-{found[-1]}") if found else None


def load(path: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises UserError that names the file where one is damaged."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        parts = {part: load_file(path / f"{part}.safetensors") for part in ("trained", "optimiser", "random")}
        return Checkpoint(Progress(**state["progress"]), optimiser_meta=state["optimiser"], **parts)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: the checkpoint is damaged: {error}. Remove the folder to use an older one") from error


def _packed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().contiguous().cpu() for name, t in tensors.items()}


def random_state() -> dict[str, torch.Tensor]:
    """The state of every generator that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random(state: Mapping[str, torch.Tensor]) -> None:
    """Set the generators as `random_state` found them."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
