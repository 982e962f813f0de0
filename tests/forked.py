"""Runs in processes of their own that need not import anew: one process imports, and forks for each."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (-9: killed), what it said, and seconds until then."""

    code: int
    said: str
    seconds: float


class Forks:
    """A process at hand. `run` gives it a job; one thread computes, so that forks are safe and sums are the same."""

    def __enter__(self) -> Forks:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)

    def run(
        self, *words: str, more: int = 0, until: int = 0, kill: float | None = None, file_size: int = 0,
        env: dict[str, str] | None = None,
    ) -> Ended:  # fmt: skip
        """ftrun WORDS. more: bytes that it may take beyond what it holds after its first step (RLIMIT_AS). until: it
        is left after that step. kill: SIGKILL after so many seconds. file_size: a file's largest (RLIMIT_FSIZE).
        """
        asked = {"words": words, "more": more, "until": until, "kill": kill, "file_size": file_size, "env": env or {}}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return Ended(**json.loads(self._server.stdout.readline()))


def serve() -> None:
    """Fork for each line of standard input."""
    import tempfile
    import threading
    import time

    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import torch

    import ftrun.cli
    import ftrun.tasks.session
    import ftrun.tasks.train  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile() as said:
            started = time.monotonic()
            child = os.fork()
            if not child:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                os._exit(_child(asked))
            timer = threading.Timer(asked["kill"] or 0, lambda pid=child: _kill(pid))
            if asked["kill"] is not None:
                timer.start()
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            timer.cancel()
            said.seek(0)
            text = said.read().decode("utf-8", "replace")
        print(json.dumps({"code": code, "said": text, "seconds": time.monotonic() - started}), flush=True)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 9)


def _child(asked: dict[str, Any]) -> int:
    import resource
    import signal
    import traceback

    from ftrun import cli
    from ftrun.tasks import shared

    os.environ.update(asked["env"])
    until, more = asked["until"], asked["more"]

    class Tight(shared.Watch):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            self.until = until or self.until

        def halts(self, step: int) -> bool:
            if step == 1 and more:
                held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (held + more, held + more))
            return super().halts(step)

    if asked["file_size"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_size"], asked["file_size"]))
    from ftrun.tasks import session

    session.Watch = Tight  # type: ignore[misc]
    try:
        return cli.main(asked["words"])
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()


if __name__ == "__main__":
    serve()
