"""One process, watched from outside: its memory, and when each of its steps ended. The same way for every program.

The kernel's lifetime peak (wait4) alone would not do: ftrun resets VmHWM at each step, and what it was is lost with it.
So VmHWM is read every POLL seconds as well, and the largest of all counts.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

POLL = 0.02  # seconds: what a peak that lasts less than that before a reset can hide, and how exact a step's end is
_TAIL = 2000  # characters of what a failed program said


@dataclass
class Seen:
    """code: the exit code. peak: bytes. ends: when each line of the metrics' file was there, in seconds from the start.
    seconds: of the whole process.
    """

    code: int = 0
    peak: int = 0
    ends: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Failed(RuntimeError):
    """A program did not end well."""


def watch(command: Sequence[str], lines: Path, log: Path, folder: Path, env: dict[str, str]) -> Seen:
    """Run `command` in `folder`, what it says into `log`. lines: the file that it adds a line to for each step.

    Raises Failed, with the end of what it said, where its exit code is not 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as said:
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=said, stderr=subprocess.STDOUT)
        try:
            seen = _follow(process, lines, started)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if seen.code:
        tail = log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
        raise Failed(f"exit code {seen.code}: {' '.join(command)[:300]}\n{tail}")
    return seen


def _follow(process: subprocess.Popen[bytes], lines: Path, started: float) -> Seen:
    seen, size = Seen(), 0
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        now = time.monotonic() - started
        seen.peak = max(seen.peak, high_water(process.pid))
        if (grown := _size(lines)) != size:
            size = grown
            written = lines.read_bytes().count(b"\n")
            seen.ends += [now] * (written - len(seen.ends))
        if done:
            process.returncode = seen.code = os.waitstatus_to_exitcode(status)
            # a process begins as a copy of this one, whose size its figure then holds
            least = high_water(os.getpid())
            ended = usage.ru_maxrss * 1024
            seen.peak, seen.seconds = max(seen.peak, ended if ended > least else 0), now
            return seen
        time.sleep(POLL)


def high_water(process: int) -> int:
    """The kernel's VmHWM of a process, in bytes; 0 where there is none any more."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_bytes().splitlines():
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
