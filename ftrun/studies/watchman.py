"""A process that outlives this one by a moment, to end what would outlive it by more."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterable

import psutil


class Watchman:
    """Ends some processes when this one is gone, however that happens, or when it is closed."""

    def __init__(self, processes: Iterable[psutil.Process]) -> None:
        names = [f"{p.pid}:{p.create_time()}" for p in processes]
        command = [sys.executable, "-m", "ftrun.studies.watchman", *names]
        # a session of its own: neither Ctrl-C nor a closed terminal is for it
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def close(self) -> None:
        """End them now."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main(names: Iterable[str]) -> None:
    """Wait for the end of the input; then end those of the processes, PID:START each, that are still the same."""
    sys.stdin.read()
    for name in names:
        pid, _, start = name.partition(":")
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if process.create_time() == float(start):
                process.kill()


if __name__ == "__main__":
    main(sys.argv[1:])
