"""`ftrun fit -m`, `ftrun data -m`: a verb on every combination of a sweep, one after the other, each in a process.

All of them are composed and found valid before the first one starts. Training is a study: see ftrun/studies.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ftrun.compose import compose, sweep
from ftrun.errors import UserError
from ftrun.secrets import hide
from ftrun.tasks.channel import die_with_parent
from ftrun.train.interrupt import Terminated

_INTERRUPTED = 130


def run_all(command: Sequence[str], overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> int:
    """Run `command` (a verb and its own options) on every combination; 0, or the first exit code that is not."""
    combinations = sweep(overrides, config_dirs)
    for line in combinations:
        try:
            compose(line, config_dirs).check()
        except UserError as error:
            raise type(error)(f"{error} [in: {' '.join(line)}]") from error
    dirs = [text for folder in config_dirs for text in ("--config-dir", str(folder))]
    codes: list[int] = []
    for number, line in enumerate(combinations, start=1):
        print(f"ftrun: {number} of {len(combinations)}: {hide(' '.join(line))}", file=sys.stderr, flush=True)
        codes.append(_run([sys.executable, "-m", "ftrun", *command, *dirs, *line]))
        if codes[-1] == _INTERRUPTED:
            break
    failed = [code for code in codes if code]
    if failed:
        print(f"ftrun: {len(failed)} of {len(combinations)} did not end well", file=sys.stderr)
    return failed[0] if failed else 0


def _run(command: Sequence[str]) -> int:
    # a verb does not ask who started it; there are no threads here that a fork would cut off
    process = subprocess.Popen(command, preexec_fn=functools.partial(die_with_parent, os.getpid()))
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code
        except Terminated:
            process.terminate()  # it came to this process alone
        except KeyboardInterrupt:
            # the child has had it from the terminal too, and saves its checkpoint; a second one ends it
            continue
