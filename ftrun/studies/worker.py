"""A worker process at the other end of two pipes: requests go in, one JSON object a line, and replies come out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-m", "ftrun.tasks.worker")
_GRACE = 10.0  # seconds that a closed worker has to end by itself


class Worker:
    """One process. It keeps what its tasks share, and dies with this process."""

    def __init__(self, log: Path, environment: Mapping[str, str] | None = None) -> None:
        """log: where what it prints goes. environment: variables beside this process's own."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env={**os.environ, "FTRUN_PARENT": str(os.getpid()), **(environment or {})},
                start_new_session=True,  # Ctrl-C of the terminal is for this process, which asks it to stop
            )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._read = b""

    def fileno(self) -> int:
        """What a selector watches for replies."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def send(self, request: Mapping[str, Any]) -> None:
        """One request. A worker that is gone takes none: that shows at its next reply."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self) -> list[dict[str, Any]] | None:
        """The replies that have come; None where the process has ended and nothing is left to read."""
        assert self._process.stdout is not None
        ended = False
        while True:
            try:
                part = os.read(self.fileno(), 1 << 16)
            except BlockingIOError:
                break
            if not part:
                ended = True
                break
            self._read += part
        *lines, self._read = self._read.split(b"\n")
        return None if ended and not lines else [json.loads(line) for line in lines if line.strip()]

    def epitaph(self) -> str:
        """Why the process ended, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        code = self._process.returncode
        if code is None:
            self.kill()
            return "the worker closed its pipe and did not end"
        return f"the worker {cause(code)}{f': {self._last_words()}' if code >= 0 else ''}"

    def kill(self) -> None:
        """End the process at once."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._close()

    def end(self) -> None:
        """Let an idle process end; a busy one is killed."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self.kill()
        self._close()

    def _close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"


def cause(code: int) -> str:
    """How a process ended, by its exit code, in words that follow a noun."""
    if code >= 0:
        return f"ended with exit code {code}"
    names = {-signal.SIGKILL: "killed (SIGKILL): out of memory, or by hand", -signal.SIGSEGV: "SIGSEGV"}
    with contextlib.suppress(ValueError):
        return f"died: {names.get(code) or signal.Signals(-code).name}"
    return f"died: signal {-code}"
