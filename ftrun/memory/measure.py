"""Memory as it is measured while a run goes on: now, and at its peak since the last reset. Under 1 ms a reading."""

from __future__ import annotations

import os
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc/self")


class Meter:
    """type: "cuda" or "cpu". `measures` says in words what its two numbers are: the two kinds are not alike."""

    def __init__(self, type: str) -> None:
        self.type = type
        self._seen = 0  # largest resident set that was sampled since the reset
        self._mark: int | None = None  # the kernel's lifetime peak at the reset, where it cannot be reset
        self.measures = "bytes of live tensors in torch's CUDA allocator" if type == "cuda" else ""
        self.reset_peak()

    def current(self) -> tuple[int, int]:
        """(allocated, peak) bytes: now, and the largest since `reset_peak`."""
        if self.type == "cuda":
            import torch

            return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        now = resident()
        self._seen = max(self._seen, now)
        highest = _high_water()
        # a lifetime peak says something of the time since the reset only where it has risen since
        if self._mark is None or highest > self._mark:
            self._seen = max(self._seen, highest)
        return now, self._seen

    def reset_peak(self) -> None:
        """Begin a new peak at what is allocated now."""
        if self.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        self._seen = resident()
        try:
            (_PROC / "clear_refs").write_text("5")  # resets VmHWM (Linux 4.0 and newer)
            self._mark = None
            self.measures = "resident bytes of the process, their peak by the kernel's count"
        except OSError:
            self._mark = _high_water()
            self.measures = "resident bytes of the process, their peak as sampled (or the kernel's, where it rose)"


def resident() -> int:
    """Bytes of this process that lie in memory now."""
    return int((_PROC / "statm").read_bytes().split()[1]) * _PAGE


def _high_water() -> int:
    """The kernel's VmHWM: the largest resident set since the process began, or since its last reset."""
    for line in (_PROC / "status").read_bytes().splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
