"""A run's folder, with its provenance: the only road between one run and another.

Everything is written aside and renamed, so that a file is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftrun.errors import UserError

# keys that may differ between a run and its continuation: they change how long or how it is watched, not what it is
_FREE = {"name", "out", "resume", "refuse", "debug", "log", "choices.log", "save_every", "steps", "epochs"}
_LISTED = 8


@dataclass(frozen=True)
class Run:
    """An opened run folder."""

    path: Path
    fresh: bool  # nothing was there before

    @property
    def checkpoints(self) -> Path:
        """Where step-N/ lie."""
        return self.path / "checkpoints"

    def result(self) -> dict[str, Any] | None:
        """result.json, or None while the run is not at its end."""
        return read_json(self.path / "result.json")

    def discard(self) -> None:
        """Remove the folder of a run that never began; one that was there before stays."""
        if self.fresh:
            shutil.rmtree(self.path, ignore_errors=True)


def cache_dir() -> Path:
    """~/.cache/ftrun, or FTRUN_CACHE; readable by the user alone. Raises UserError where it cannot be made."""
    path = Path(os.environ.get("FTRUN_CACHE") or Path.home() / ".cache" / "ftrun").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"FTRUN_CACHE={path}: the cache folder cannot be made: {error.strerror}") from error
    return path


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` to write to; flushed and renamed over it where the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        if beside.is_dir():
            for part in beside.rglob("*"):
                _flush(part)
        _flush(beside)
        os.replace(beside, path)
        _flush(path.parent)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """One JSON object, whole or not at all; numbers that JSON lacks are refused."""
    with aside(path) as beside:
        beside.write_text(json.dumps(content, indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no such file. Raises UserError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error


def open_run(path: Path, job: Mapping[str, Any], resume: str) -> Run:
    """The folder of `job`, made now or found with the same job in it; raises UserError as `check_run` does."""
    there = check_run(path, job, resume)
    if there is None:
        _make(path, job)
        return Run(path, fresh=True)
    if there != dict(job):
        _write_yaml(path / "job.yaml", job)
    return Run(path, fresh=False)


def check_run(path: Path, job: Mapping[str, Any], resume: str) -> dict[str, Any] | None:
    """The job that lies in the folder `path`, None where nothing does. Touches nothing.

    Raises UserError where another job lies there (with the difference), where one does and resume=never, or where
    the folder is something else.
    """
    held = path / "job.yaml"
    if path.exists() and not path.is_dir():
        raise UserError(f"out={path}: expected a folder, found a file")
    if not held.is_file():
        if path.is_dir() and any(path.iterdir()):
            raise UserError(f"out={path}: the folder is not empty and holds no run (no job.yaml); name another")
        return None
    if resume == "never":
        raise UserError(f"out={path}: a run lies there and resume=never; name another folder, or resume=auto")
    try:
        there = yaml.safe_load(held.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{held}: not readable as YAML; name another out") from error
    if not isinstance(there, dict):
        raise UserError(f"{held}: expected a mapping, found {type(there).__name__}; name another out")
    changes = differences(there, job)
    if changes and resume != "force":
        raise UserError(f"out={path}: another job lies there.\n{_listed(changes)}\nName another out, or resume=force")
    return there


def _make(path: Path, job: Mapping[str, Any]) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        _write_yaml(path / "job.yaml", job)
    except OSError as error:
        raise UserError(f"out={path}: the folder cannot be written: {error.strerror}") from error


def _write_yaml(path: Path, job: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(dict(job), sort_keys=False, allow_unicode=True)
    header = f"# ftrun job={path}    runs this job again; overrides may follow\n"
    with aside(path) as beside:
        beside.write_text(header + text, encoding="utf-8")


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


def _listed(changes: list[tuple[str, Any, Any]]) -> str:
    lines = [f"  {path}: {old!r} there, {new!r} now" for path, old, new in changes[:_LISTED]]
    more = len(changes) - _LISTED
    return "\n".join([*lines, f"  … and {more} more"] if more > 0 else lines)
