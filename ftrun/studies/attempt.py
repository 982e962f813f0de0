"""One attempt at a task, on the machine that it came to: the worker as a child of this process, and how that ended.

An engine's own process runs this there (Ray's worker, a step of a Slurm job); the child dies with it. Light: neither
torch nor an engine is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftrun import lock
from ftrun.dialogue import is_end, read_lines, stop_asked
from ftrun.errors import UserError
from ftrun.studies.worker import COMMAND, cause

_FREE = 60.0  # seconds that the process of an earlier attempt has to leave the run's folder
_GRACE = 60.0  # seconds that a run has to save what it has when the time is nearly up; submitit warns 90 ahead
_LOOK = 1.0  # seconds between two looks at the process to die with


class AttemptLost(RuntimeError):
    """The worker's process ended before it could tell how its task ended."""


@dataclass
class Attempt:
    """What an engine is given to run: importable, so that it is pickled by its name and these few values.

    task: TASK.json. cwd: the folder that a job's relative paths are meant from. environment: variables on top of the
    machine's own. log: where the worker's prints go; None: where this process's go. parent: a process of this machine
    to die with, beside the engine's own.
    """

    task: str
    cwd: str
    environment: Mapping[str, str] = field(default_factory=dict)
    log: str | None = None
    parent: int | None = None

    def __call__(self) -> None:
        """Do the task. Raises AttemptLost where it did not come to an end of its own."""
        task = Path(self.task)
        if not task.is_file() or not Path(self.cwd).is_dir():
            missing = self.cwd if task.is_file() else self.task
            raise AttemptLost(f"{os.uname().nodename} does not see {missing}: a study's folder is on shared storage")
        if self.parent is not None:
            threading.Thread(target=_die_with, args=(self.parent,), daemon=True).start()
        _wait_until_free(json.loads(task.read_text(encoding="utf-8")))
        code = self._run(task)
        told = read_lines(task.with_suffix(".events.jsonl"))[0]
        if not told or not is_end(told[-1], stop_asked(task)):
            stopped = bool(told) and told[-1].get("status") == "stopped"
            raise AttemptLost("stopped from outside, with a checkpoint" if stopped else f"the worker {cause(code)}")

    def checkpoint(self) -> Any:
        """submitit asks when the time is nearly up: let the run save what it has, and go on in the next slot."""
        from submitit.helpers import DelayedSubmission

        child = getattr(self, "_child", None)
        if child is not None:
            child.send_signal(_warning())
            _wait_for(child.pid, _GRACE)
        return DelayedSubmission(Attempt(self.task, self.cwd, self.environment, self.log, self.parent))

    def _run(self, task: Path) -> int:
        """The worker, to its end; returns its exit code."""
        environment = {**os.environ, **self.environment, "FTRUN_PARENT": str(os.getpid())}
        said = open(self.log, "ab") if self.log else None  # noqa: SIM115
        try:
            child = subprocess.Popen(
                [*COMMAND, str(task)], cwd=self.cwd, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )
        finally:
            if said is not None:
                said.close()
        self._child = child
        try:
            return child.wait()
        finally:
            child.kill()
            child.wait()


def _warning() -> int:
    """The signal that tells submitit's jobs that the time is nearly up."""
    from submitit.core.job_environment import JobEnvironment

    return int(JobEnvironment._usr_sig())


def _wait_for(child: int, seconds: float) -> None:
    """Until a child has ended, from within a signal's handler: the interrupted Popen.wait holds its lock and reaps."""
    until = time.monotonic() + seconds
    with suppress(ChildProcessError):
        while time.monotonic() < until and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.1)


def _wait_until_free(request: Mapping[str, Any]) -> None:
    """The process of a lost attempt may take a moment to go; one that stays is told of by the worker."""
    until = time.monotonic() + _FREE
    while time.monotonic() < until:
        try:
            lock.check_free(Path(str(request["tree"]["out"])))
            break
        except UserError:
            time.sleep(0.2)


def _die_with(parent: int) -> None:
    """End this process, and with it its child, when `parent` is gone."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(parent)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_LOOK)
    os._exit(1)
