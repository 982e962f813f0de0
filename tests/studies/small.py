"""Small real studies: tiny jobs, the command as a user types it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ftrun.cli import main
from tests.jobs import overrides, tiny_base, write_rows

SHORT = ("steps=3", "eval.max_new_tokens=0", "save_every=null")


def typed(tmp_path: Path, *more: str) -> list[str]:
    """A study of tiny jobs in tmp_path/study, as typed after `ftrun`."""
    rows = tmp_path / "rows.jsonl"
    if not rows.exists():
        write_rows(rows)
    named = {m.partition("=")[0] for m in more}
    short = [s for s in SHORT if s.partition("=")[0] not in named]
    place = [] if named & {"out", "name"} else [f"out={tmp_path / 'study'}"]
    return ["-m", *overrides(tiny_base(tmp_path / "llama"), rows, *short, *place, *more)]


def ftrun(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The command, to its end, in this process; its workers are processes of their own all the same."""
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        code = main(arguments)
    return subprocess.CompletedProcess([*arguments], code, said.getvalue(), wrong.getvalue())


def apart(arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, to its end, in a process of its own."""
    command = [sys.executable, "-m", "ftrun", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def started(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """The command, at work in a session of its own."""
    with log.open("ab") as said:
        command = [sys.executable, "-m", "ftrun", *arguments]
        # a shell that put the tests in the background has them ignore Ctrl-C, and what they start with them
        heard = signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            return subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        finally:
            signal.signal(signal.SIGINT, heard)


def events(folder: Path) -> list[dict[str, Any]]:
    """The ledger as it is now, torn lines left out."""
    path = folder / "ledger.jsonl"
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def wait_for(ready: Callable[[], Any], seconds: float = 120.0) -> Any:
    """What `ready` gives as soon as it is true; AssertionError after so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := ready():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come to that in time")


def descendants(pid: int) -> list[int]:
    """Every process that stems from one."""
    found, parents = [], {pid}
    rows = {int(p.name): _parent(p) for p in Path("/proc").glob("[0-9]*")}
    while True:
        new = [p for p, parent in rows.items() if parent in parents and p not in found]
        if not new:
            return found
        found += new
        parents |= set(new)


def kill_all(process: subprocess.Popen[bytes], alone: bool = True) -> list[int]:
    """SIGKILL to the command alone, or to all that stem from it too; returns the processes that it had started."""
    children = descendants(process.pid)
    for pid in (process.pid, *(() if alone else children)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return children


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _parent(path: Path) -> int:
    try:
        return int((path / "stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0
