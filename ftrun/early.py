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
    """UserError where a job asks for a way of sharing that cannot take effect."""
    if job.devices == 1:
        asked = {"strategy": job.strategy != "auto", "offload": job.offload, "max_restarts": job.max_restarts > 0}
        asked |= {"nnodes": (job.nnodes or 1) > 1, "rdzv_endpoint": job.rdzv_endpoint is not None}
        for key in (key for key, given in asked.items() if given):
            raise UserError(f"{key}={getattr(job, key)}: has no effect with devices=1; give devices=2 or more")
    if job.offload and job.strategy != "fsdp":
        raise UserError(
            f"offload=true: found strategy={job.strategy}, expected strategy=fsdp: it is its parts that wait"
        )
    if job.nnodes and job.devices % job.nnodes:
        raise UserError(f"devices={job.devices}: expected a multiple of nnodes={job.nnodes}: as many on each machine")
    if job.devices > 1 and job.keep_prefix not in ("auto", "none"):
        raise UserError(f"keep_prefix={job.keep_prefix}: found devices={job.devices}; only one device keeps a prefix")


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
