"""Devices: sizes as people write them, named cards, and what this machine leaves to a process."""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path

import pytest
import torch
import yaml

from ftrun import schema
from ftrun.errors import UserError
from ftrun.memory.device import Options, resolve
from ftrun.memory.host import memory
from ftrun.memory.sizes import parse_size

FOLDER = Path(__file__).parents[2] / "conf" / "device"
CHOICES = sorted(p.stem for p in FOLDER.glob("*.yaml"))
GB, GIB = 10**9, 2**30
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def options(name: str, **changes: object) -> Options:
    return schema.build(Options, {**yaml.safe_load((FOLDER / f"{name}.yaml").read_text()), **changes}, "device")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * GB),
        ("24 gb", 24 * GB),
        ("24GiB", 24 * GIB),
        ("1.5g", 1_500_000_000),
        ("512MiB", 512 * 2**20),
        ("1e9", GB),
        ("25,000,000,000", 25 * GB),
        (12, 12),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text, "device.memory") == size


@pytest.mark.parametrize("text", ["24GX", "lots", "", "-1GB", 0, -5, "0GB", "24 GB GB"])
def test_sizes_that_are_none_name_the_key(text: int | str) -> None:
    with pytest.raises(UserError, match=r"^device\.memory="):
        options("cpu", memory=text)


@pytest.mark.parametrize("name", CHOICES)
def test_each_choice_resolves(name: str) -> None:
    made = options(name)
    assert {f.name for f in dataclasses.fields(made)} == set(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))
    if made.memory is None:
        return
    device = resolve(made)
    assert device.type == "cuda"
    assert device.total_bytes == parse_size(made.memory, "device.memory")
    digits = [int(part[:-2]) for part in name.split("-") if part.endswith("gb")]
    assert all(0.95 <= device.total_bytes / (n * GB) <= 1.07 for n in digits)


@no_gpu
def test_a_card_that_is_not_here_is_planned_for() -> None:
    device = resolve(options("rtx4090"))
    assert (device.name, device.present, device.bf16) == ("NVIDIA GeForce RTX 4090", False, True)
    assert device.free_bytes == device.total_bytes == 24209 * 2**20
    assert not resolve(options("t4")).bf16


@no_gpu
def test_cuda_without_a_gpu_or_a_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"device=cuda: expected a CUDA device, or device\.memory"):
        resolve(options("cuda"))


@no_gpu
def test_auto_is_the_cpu_here() -> None:
    device = resolve(options("auto"))
    assert (device.type, device.present) == ("cpu", True)
    assert 0 < device.free_bytes <= device.total_bytes


def test_a_size_is_a_ceiling() -> None:
    device = resolve(options("cpu", memory="1GB"))
    assert (device.total_bytes, device.free_bytes, device.present) == (GB, GB, True)
    assert not resolve(options("cpu", memory="900TB")).present


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A root with 64 GiB, 60 of them available, and the cgroup files that are given."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {60 * 2**20} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "5:memory:/job\n2:cpu,cpuacct:/job\n"
CASES = {
    "none": ("", {}, (64, 60)),
    "v2": (
        "0::/slice/job\n",
        {
            "slice/job/memory.max": f"{8 * GIB}\n",
            "slice/job/memory.current": f"{5 * GIB}\n",
            "slice/job/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
        },
        (8, 5),
    ),
    "v2, the parent is tighter": (
        "0::/slice/job\n",
        {
            "slice/job/memory.max": "max\n",
            "slice/memory.max": f"{4 * GIB}\n",
            "slice/memory.current": f"{1 * GIB}\n",
        },
        (4, 3),
    ),
    "v2, in a container": ("0::/\n", {"memory.max": f"{2 * GIB}", "memory.current": "0"}, (2, 2)),
    "v1": (
        V1,
        {
            "memory/job/memory.limit_in_bytes": f"{16 * GIB}\n",
            "memory/job/memory.usage_in_bytes": f"{4 * GIB}\n",
            "memory/job/memory.stat": f"total_inactive_file {1 * GIB}\n",
        },
        (16, 13),
    ),
    "v1, unlimited": (V1, {"memory/job/memory.limit_in_bytes": "9223372036854771712\n"}, (64, 60)),
    "v1, the path is not visible": (
        "4:memory:/elsewhere/id\n",
        {"memory/memory.limit_in_bytes": f"{3 * GIB}\n", "memory/memory.usage_in_bytes": f"{4 * GIB}\n"},
        (3, 0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_cgroups(case: str, tmp_path: Path) -> None:
    cgroup, files, expected = CASES[case]
    assert tuple(n / GIB for n in memory(machine(tmp_path, cgroup, files))) == expected


def test_ulimit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = machine(tmp_path, "", {})
    (root / "proc/self/statm").write_text(f"{GIB // resource.getpagesize()} 1 1")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10 * GIB, resource.RLIM_INFINITY))
    assert memory(root) == (10 * GIB, 9 * GIB)


def test_this_machine() -> None:
    total, free = memory()
    assert 0 < free <= total
