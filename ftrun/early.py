"""What can be told of a whole job before torch is loaded: its devices, the depth of its model, its empty files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ftrun.errors import UserError
from ftrun.selection import parse_layers

if TYPE_CHECKING:
    from ftrun.job import Job

# what configs call the number of decoder layers
_DEPTHS = ("num_hidden_layers", "n_layer")


def check(job: Job) -> None:
    """Raises UserError on what contradicts itself, this version, or the files that are at hand."""
    check_devices(job)
    check_files(job)
    layers = depth(job)
    if layers is not None:
        check_depth(job, layers)


def check_devices(job: Job) -> None:
    """UserError where a job wants what this version has not: several devices."""
    if job.devices > 1 or job.strategy != "auto":
        found = f"devices={job.devices}, strategy={job.strategy}"
        raise UserError(f"{found}: expected devices=1 and strategy=auto; this version trains on one device")


def check_files(job: Job) -> None:
    """UserError where a file of the data's is empty."""
    for key in ("path", "held_out_path"):
        path = getattr(job.data.options, key, None)
        if isinstance(path, str) and (full := Path(os.path.expanduser(path))).is_file() and not full.stat().st_size:
            raise UserError(f"data.{key}={path}: the file is empty, expected rows")


def check_depth(job: Job, depth: int) -> None:
    """UserError where `layers` or `checkpointing` names layers that a model of `depth` layers has not."""
    parse_layers(getattr(job.method.options, "layers", "all"), depth)
    if isinstance(job.checkpointing, int) and job.checkpointing > depth:
        raise UserError(
            f"checkpointing={job.checkpointing}: the model has {depth} layers; expected none, all, auto, "
            f"or a number up to {depth}"
        )


def depth(job: Job) -> int | None:
    """The model's decoder layers, by the YAML's facts or the folder's config.json; None where neither tells."""
    options = job.model.options
    facts = options.arch if options.path is None else _config(Path(os.path.expanduser(options.path)))
    found = next((facts[key] for key in _DEPTHS if key in facts), None)
    return found if isinstance(found, int) and found > 0 else None


def _config(folder: Path) -> dict[str, object]:
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # a damaged folder is told of by whoever opens it
    inner = facts.get("text_config") if isinstance(facts, dict) else {}
    return {**facts, **(inner if isinstance(inner, dict) else {})} if isinstance(facts, dict) else {}
