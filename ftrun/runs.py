"""A run's folder, with its provenance: the only road between one run and another.

Everything is written aside and renamed, so that a file is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftrun import lock
from ftrun.errors import UserError, nearest

# keys that may differ between a run and its continuation: they change how long or how it is watched, not what it is
_FREE = {
    "devices",
    "strategy",
    "offload",
    "max_restarts",
    "nnodes",
    "rdzv_endpoint",
    "name",
    "out",
    "resume",
    "refuse",
    "allow_drift",
    "debug",
    "log",
    "choices.log",
    "save_every",
    "save_last",
    "skip_nonfinite",
    "steps",
    "epochs",
}
_LISTED = 8
_LONGEST = 255  # bytes of a file's name
# what a process that was killed while it wrote leaves beside its files
_LEFT = re.compile(r"\.(.+)\.\d+\.(tmp|old)")


@dataclass(frozen=True)
class Run:
    """An opened run folder, ours alone until `release`."""

    path: Path
    fresh: bool  # no run was there before
    made: tuple[Path, ...]  # the folders that were made for it, innermost first
    held: lock.Lock

    @property
    def checkpoints(self) -> Path:
        """Where step-N/ lie."""
        return self.path / "checkpoints"

    def result(self) -> dict[str, Any] | None:
        """result.json, or None while the run is not at its end."""
        return read_json(self.path / "result.json")

    def discard(self) -> None:
        """Take away what a run that never began has made; what was there before stays."""
        if not self.fresh:
            return
        for part in self.path.iterdir():
            _remove(part)
        for folder in self.made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def release(self) -> None:
        """Let others in."""
        self.held.release()

    def record(self, job: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
        """The job that the folder now holds, under lines of notes; the result of an earlier end is no longer one."""
        (self.path / "result.json").unlink(missing_ok=True)
        write_job(self.path, self.path, job, notes)


def cache_dir() -> Path:
    """~/.cache/ftrun, or FTRUN_CACHE; readable by the user alone. Raises UserError where it cannot be made."""
    given = os.environ.get("FTRUN_CACHE")
    try:
        path = Path(given or "~/.cache/ftrun").expanduser()
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except RuntimeError as error:
        raise UserError("FTRUN_CACHE: this user has no home folder for a cache; set FTRUN_CACHE=DIR") from error
    except OSError as error:
        raise UserError(f"FTRUN_CACHE={path}: the cache folder cannot be made: {error.strerror}") from error
    return path


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` to write to; flushed and put in its place where the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        if beside.is_dir():
            for part in beside.rglob("*"):
                _flush(part)
        _flush(beside)
        _replace(beside, path)
        _flush(path.parent)
    finally:
        _remove(beside)


def tidy(folder: Path) -> None:
    """Take away what killed processes left half-written in `folder`, which must be ours."""
    for part in folder.iterdir() if folder.is_dir() else ():
        match = _LEFT.fullmatch(part.name)
        if match and match[2] == "old" and not (folder / match[1]).exists():
            part.rename(folder / match[1])  # killed between its two renames
        elif match or part.name.endswith(".jsonl.new"):
            _remove(part)


def _replace(new: Path, path: Path) -> None:
    """`new` in the place of `path`. A folder that is there stays until the new one is, where the system can."""
    try:
        os.replace(new, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(new, path):
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.rename(path, old)
            os.rename(new, path)
            _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one instant (Linux's renameat2); False where that is not to be had."""
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(swap)) == 0)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """One JSON object, whole or not at all; null for the numbers that JSON lacks."""
    with aside(path) as beside:
        text = json.dumps(finite(dict(content)), indent=2, allow_nan=False, default=str)
        beside.write_text(text + "\n", encoding="utf-8")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(value: Any) -> Any:
    """The value with null for what JSON has no number for: infinity and NaN."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no such file. Raises UserError where it is not one of JSON."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged: expected a JSON object, found {type(found).__name__}")
    return found


def check_finished(path: Path) -> None:
    """UserError where the run in a folder is not at its end."""
    result = read_json(path / "result.json")
    if result is None or result.get("status") != "finished":
        found = "it is not at its end" if result is None else f"its status is {result.get('status')}"
        raise UserError(f"run={path}: {found}; the same command goes on with it: ftrun job={path}/job.yaml out={path}")


def open_run(path: Path, job: Mapping[str, Any], resume: str) -> Run:
    """The folder of `job`, made now or found with the same job in it, and held; raises UserError as `check_run` does.

    The job of an earlier run stays on record until `Run.record`.
    """
    with _readable(path):
        made = tuple(p for p in (path, *path.parents) if not p.exists())
        path.mkdir(parents=True, exist_ok=True)
        held = lock.Lock(path)
    run = Run(path, False, made, held)
    try:
        there = _check_run(path, job, resume)
        with _readable(path):
            tidy(path)
            tidy(run.checkpoints)
            if there is None:
                run = Run(path, True, made, held)
                run.record(job)
    except BaseException:
        run.discard()
        run.release()
        raise
    return run


def check_run(path: Path, job: Mapping[str, Any], resume: str) -> dict[str, Any] | None:
    """The job that lies in the folder `path`, None where nothing does. Touches nothing.

    Raises UserError where another job lies there (with the difference), where one does and resume=never, where
    another process is at work there, where the folder is something else, or cannot be read or written.
    """
    for name in path.parts:
        if (size := len(os.fsencode(name))) > _LONGEST:
            raise UserError(f"out=…/{name[:60]}…: a name of {size} bytes, expected {_LONGEST} or less")
    with _readable(path):
        there = _check_run(path, job, resume)
        nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not os.access(nearest, os.W_OK | os.X_OK):
            why = "cannot be written" if nearest.is_dir() else "is a file"
            raise UserError(f"out={path}: {nearest} {why}; name another out")
    lock.check_free(path)
    return there


def check_place(path: Path, key: str = "out") -> None:
    """UserError, naming the key, where nothing can be made at `path`: a look ahead of long work. Touches nothing."""
    above = next(p for p in path.absolute().parents if os.path.exists(p))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "cannot be written" if above.is_dir() else "is a file"
        raise UserError(f"{key}={path}: {above} {why}; name another {key}")


def job_file(path: Path) -> Path:
    """The job.yaml of a run's folder. Raises UserError, naming what comes nearest, where `path` is no such folder."""
    found = path / "job.yaml"
    if found.is_file():
        return found
    if not path.is_dir():
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        close = nearest(path.name, beside)
        guess = f". Did you mean run={path.parent / close}?" if close else ""
        raise UserError(f"run={path}: no such folder{guess}")
    if (path.parent / "job.yaml").is_file():
        raise UserError(f"run={path}: expected the run's own folder. Did you mean run={path.parent}?")
    if (path / "study.yaml").is_file():
        raise UserError(f"run={path}: a study of several runs: name one of {path / 'runs'}")
    raise UserError(f"run={path}: holds no run (no job.yaml)")


def steps_done(path: Path) -> int:
    """The steps that a run's folder holds: those of its result or of its newest checkpoint."""
    result = read_json(path / "result.json") or {}
    finished = result.get("steps") if result.get("status") == "finished" else 0
    return max(finished if isinstance(finished, int) else 0, *saved_steps(path / "checkpoints"), 0)


def saved_steps(checkpoints: Path) -> list[int]:
    """The steps that have a checkpoint, lowest first."""
    found = (re.fullmatch(r"step-(\d+)", p.name) for p in checkpoints.glob("step-*"))
    return sorted(int(m.group(1)) for m in found if m)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        shown = str(path) if len(str(path)) < 200 else f"{str(path)[:80]}… ({len(str(path))} characters)"
        raise UserError(f"out={shown}: the folder cannot be used: {error.strerror}; name another out") from error


def _check_run(path: Path, job: Mapping[str, Any], resume: str) -> dict[str, Any] | None:
    held = path / "job.yaml"
    if path.exists() and not path.is_dir():
        raise UserError(f"out={path}: expected a folder, found a file")
    if not held.is_file():
        if path.is_dir() and any(p.name != lock.NAME and not _LEFT.fullmatch(p.name) for p in path.iterdir()):
            raise UserError(f"out={path}: the folder is not empty and holds no run (no job.yaml); name another")
        return None
    if resume == "never":
        raise UserError(f"out={path}: a run lies there and resume=never; name another folder, or resume=auto")
    try:
        there = yaml.safe_load(held.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{held}: not readable as YAML; name another out") from error
    if not isinstance(there, dict):
        raise UserError(f"{held}: expected a mapping, found {type(there).__name__}; name another out")
    changes = differences(there, job)
    if changes and resume != "force":
        raise UserError(f"out={path}: another job lies there.\n{listed(changes)}\nName another out, or resume=force")
    return there


def write_job(folder: Path, run: Path, job: Mapping[str, Any], notes: Sequence[str]) -> None:
    """job.yaml into `folder`, under lines of notes. run: where the folder will lie."""
    text = yaml.safe_dump(dict(job), sort_keys=False, allow_unicode=True)
    header = f"# ftrun job={run / 'job.yaml'}    runs this job again; overrides may follow\n"
    with aside(folder / "job.yaml") as beside:
        beside.write_text(header + "".join(f"# {note}\n" for note in notes) + text, encoding="utf-8")


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(path, old, new) of what makes two jobs different jobs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in {**old, **new}:
            path = f"{prefix}{key}"
            if path not in _FREE:
                found += differences(old.get(key), new.get(key), path + ".")
        return found
    return [] if old == new else [(prefix.rstrip("."), old, new)]


def listed(changes: list[tuple[str, Any, Any]]) -> str:
    """The differences in lines of their own, for a message."""
    lines = [f"  {path}: {old!r} there, {new!r} now" for path, old, new in changes[:_LISTED]]
    more = len(changes) - _LISTED
    return "\n".join([*lines, f"  … and {more} more"] if more > 0 else lines)
