"""A blend as a run's folder that generate, merge, check and eval take: job.yaml, adapter/ in PEFT's format, result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ftrun import assemble
from ftrun.compose import changed
from ftrun.errors import UserError
from ftrun.job import Job
from ftrun.methods.blend import Blend
from ftrun.methods.files import hashes, save_adapter
from ftrun.models import provenance
from ftrun.runs import aside, write_job, write_json


def save(folder: Path, job: Job, parts: assemble.Sketch, blend: Blend, record: Mapping[str, Any]) -> None:
    """The folder, whole or not at all. job: of the first adapter, whose base it is. record: what was blended.

    Raises UserError where it cannot be written.
    """
    own, base, scheme = blend.adapter, parts.base, parts.quantiser.scheme()
    config, tensors = own.tuner.adapter_config(own.anatomy, base.reference), own.tuner.state(own.wrappers)
    try:
        with aside(folder) as beside:
            save_adapter(beside / "adapter", config, tensors)
            facts = {**provenance.record(base, scheme), "method": "lora", "versions": provenance.versions()}
            facts |= {"files": hashes(beside / "adapter"), "blend": record}
            write_json(beside / "adapter" / provenance.FILE, facts)
            write_job(beside, folder, _job(job, config, folder), ["a blend of adapters: this job did not train it"])
            outcome = {"status": "finished", "steps": 0, "blend": record}
            write_json(beside / "result.json", {**outcome, "base": {**base.describe(), "quantisation": scheme}})
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"out={folder}: cannot be written: {why}") from error


def _job(job: Job, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The job whose LoRA has the blend's shape: that of the first adapter, of another rank on other weights."""
    found = changed(job, ["method=lora"]).as_dict()
    shape = {"rank": config["r"], "alpha": config["lora_alpha"], "dropout": 0.0, "layers": "all"}
    shape |= {"targets": [*config["target_modules"], *(config["target_parameters"] or [])]}
    rest = {"rank_pattern": config["rank_pattern"], "alpha_pattern": config["alpha_pattern"], "from": None}
    rest |= {"rslora": False, "modules_to_save": [], "dtype": "float32"}
    return {**found, **shape, "method": {**found["method"], **shape, **rest}, "name": None, "out": str(folder)}
