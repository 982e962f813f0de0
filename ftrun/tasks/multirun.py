"""`-m`: every combination of a sweep, one after the other, each in a process of its own.

All of them are composed and found valid before the first one starts. Each has a run folder of its own, named for
the values that it sweeps.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ftrun.compose import compose, sweep
from ftrun.errors import UserError
from ftrun.job import GROUPS
from ftrun.shell import plain, quote
from ftrun.train.interrupt import Terminated

_INTERRUPTED = 130


def run_all(command: Sequence[str], overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> int:
    """Run `command` (a verb and its own options) on every combination; 0, or the first exit code that is not."""
    combinations = sweep(overrides, config_dirs)
    lines = _placed(combinations, overrides)
    for shown, line in zip(combinations, lines, strict=True):
        try:
            compose(line, config_dirs).check()
        except UserError as error:
            raise type(error)(f"{error} [in: {' '.join(shown)}]") from error
    dirs = [text for folder in config_dirs for text in ("--config-dir", str(folder))]
    codes: list[int] = []
    for number, (shown, line) in enumerate(zip(combinations, lines, strict=True), start=1):
        print(f"ftrun: {number} of {len(lines)}: {' '.join(shown)}", file=sys.stderr, flush=True)
        codes.append(_run([sys.executable, "-m", "ftrun", *command, *dirs, *line]))
        if codes[-1] == _INTERRUPTED:
            break
    failed = [code for code in codes if code]
    if failed:
        print(f"ftrun: {len(failed)} of {len(lines)} did not end well", file=sys.stderr)
    return failed[0] if failed else 0


def _run(command: Sequence[str]) -> int:
    process = subprocess.Popen(command)
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code
        except Terminated:
            process.terminate()  # it came to this process alone
        except KeyboardInterrupt:
            # the child has had it from the terminal too, and saves its checkpoint; a second one ends it
            continue


def _placed(lines: Sequence[list[str]], overrides: Sequence[str]) -> list[list[str]]:
    """Each line with a name of its own, or a folder of its own inside out=DIR."""
    given = {text.partition("=")[0]: text for text in overrides}
    place = "out" if "out" in given else "name"
    kind = plain(place, given[place].partition("=")[2]) if place in given else None
    start = kind or time.strftime("%m%d-%H%M%S")
    swept = [text for text in lines[0] if text not in overrides]
    labels = [_label(line, [lines[0].index(text) for text in swept]) for line in lines]
    if len(set(labels)) < len(lines):
        labels = [f"{number}-{label}" for number, label in enumerate(labels, start=1)]
    made = []
    for line, label in zip(lines, labels, strict=True):
        where = f"{start}/{label}" if place == "out" else f"{label}-{start}" if label else start
        made.append([*(text for text in line if text != given.get(place)), f"{place}={quote(where)}"])
    return made


def _label(line: Sequence[str], swept: Sequence[int]) -> str:
    """dora-rank8-lr0.001: what tells a combination from the others, fit for a folder's name."""
    words = []
    for index in swept:
        key, _, value = line[index].partition("=")
        words.append(value if key in GROUPS else key.rpartition(".")[2] + value)
    return re.sub(r"[^\w.-]+", "_", "-".join(words))[:120].strip("_")
