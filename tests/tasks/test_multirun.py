"""A verb on every combination: its process does not outlive the one that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.studies.small import alive, descendants, wait_for


def test_a_killed_parent_leaves_no_child() -> None:
    code = "from ftrun.tasks.multirun import _run; _run(['sleep', '600'])"
    process = subprocess.Popen([sys.executable, "-c", code])
    (child,) = wait_for(lambda: [p for p in descendants(process.pid) if _name(p) == "sleep"])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not alive(child), 5)


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""
