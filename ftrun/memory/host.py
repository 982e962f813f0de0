"""Host memory that this process may still take: the machine's, its cgroup's (v1 and v2) and its own limits."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 1 << 60  # v1 writes "no limit" as a number a little below 2^63
_PAGE = resource.getpagesize()


_VECTOR_MATHS: tuple[str, ...] = (
    "cos",
    "sin",
    "tan",
    "exp",
    "expm1",
    "log",
    "log2",
    "log1p",
    "sqrt",
    "rsqrt",
    "tanh",
    "erf",
    "erfc",
)
_VECTOR_MATHS += ("sigmoid", "acos", "asin", "atan", "cosh", "sinh", "erfinv")
# glibc's malloc.h
_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1
_keeps: set[int] = set()  # this process, once it keeps pages


def few_arenas() -> None:
    """Has the C library keep two arenas: it reserves 64 MB of address space for each thread that it gives its own.

    The large blocks of tensors are made by one thread alone. Elsewhere nothing happens.
    """
    _tell({_ARENA_MAX: ("MALLOC_ARENA_MAX", 2)})


def keep_pages() -> None:
    """Has the C library keep the pages of freed tensors for the next ones.

    Pages that go back to the system with every large block, and come back zeroed, cost some 5 % of a step; kept ones
    come in pieces that do not always fit, so this is for jobs that leave room. Where the C library is another one
    nothing happens, nor where the user has set this by MALLOC_… in the environment.
    """
    _keeps.add(os.getpid())
    _tell({_MMAP_MAX: ("MALLOC_MMAP_MAX_", 0), _TRIM_THRESHOLD: ("MALLOC_TRIM_THRESHOLD_", (1 << 31) - 1)})


def change_pages() -> None:
    """Has the C library give back large blocks again, where an earlier job of this process has had it keep them."""
    if _keeps:
        _keeps.clear()
        _tell({_MMAP_MAX: ("MALLOC_MMAP_MAX_", 65536), _TRIM_THRESHOLD: ("MALLOC_TRIM_THRESHOLD_", 128 << 10)})


def give_back() -> None:
    """Lets go of memory that allocators keep for later: the C library's, and CUDA's where that is at work."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _tell(asked: dict[int, tuple[str, int]]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for key, (name, value) in asked.items():
            if name not in os.environ:
                library.mallopt(key, value)


def settle_maths() -> None:
    """Calls the functions of the vector maths library once, on a few numbers.

    Where two threads made a process's first call of cos together, on the halves of a tensor, one half was seen to come
    out less exact: rotary angles off by a bfloat16 step in every hundredth, in 5 of 14 runs of the default model, so
    that the same command did not end in the same weights. After a first call on few numbers: in none of 20.
    """
    import torch

    few = torch.full((8,), 0.5)
    for number in (few, few.double()):
        for name in _VECTOR_MATHS:
            getattr(torch, name)(number)


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """(total, free) bytes: the tightest of every limit. root: where /proc and /sys lie."""
    pairs = [_machine(root), *_cgroups(root)]
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY:
        size = int((root / "proc/self/statm").read_text().split()[0]) * _PAGE
        pairs.append((soft, soft - size))
    return min(total for total, _ in pairs), max(0, min(free for _, free in pairs))


def _machine(root: Path) -> tuple[int, int]:
    lines = (root / "proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1}
    return sizes["MemTotal"], sizes.get("MemAvailable", sizes["MemFree"])


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, free) of each group that this process is in, up to the root: a parent's limit holds as well."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        mount = root / "sys/fs/cgroup/memory"
        if not controllers:
            names, mount = ("memory.max", "memory.current", "inactive_file"), root / "sys/fs/cgroup"
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mount):
                break
            limit = _number(folder / names[0])
            if limit is not None and limit < _UNLIMITED:
                yield limit, limit - (_number(folder / names[1]) or 0) + _reclaimable(folder, names[2])


def _reclaimable(folder: Path, key: str) -> int:
    """Cached files count as used, and are given up as soon as memory is asked for."""
    rows = (line.split() for line in _text(folder / "memory.stat").splitlines())
    return next((int(row[1]) for row in rows if row[0] == key), 0)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
