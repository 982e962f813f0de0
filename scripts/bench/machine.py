"""The machine's shape: what a figure says nothing without."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "bf16")
_PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")


def shape() -> dict[str, Any]:
    """Cores that this process may use, the processor, its instruction sets that matter here, memory, versions."""
    facts = _facts(Path("/proc/cpuinfo"))
    known = set((facts.get("flags") or facts.get("Features") or "").split())
    memory = _facts(Path("/proc/meminfo")).get("MemTotal", "0 kB")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": facts.get("model name", platform.processor() or platform.machine()),
        "sets": [name for name in _SETS if name in known],
        "memory_bytes": int(memory.split()[0]) * 1024,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def line(found: dict[str, Any]) -> str:
    """The shape in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if number)
    sets = " ".join(found["sets"]) or "no instruction set of note"
    return f"{found['cores']} cores of {found['processor']} ({sets}), {found['memory_bytes'] / 1e9:.0f} GB; {versions}"


def _facts(path: Path) -> dict[str, str]:
    """The first "key : value" of each key in a file of the kernel's."""
    found: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    for row in text.splitlines():
        key, colon, value = row.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
