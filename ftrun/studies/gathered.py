"""Rows of what lies in folders: of runs, of studies; what differs between their job.yaml files are their axes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from ftrun import lock
from ftrun.errors import UserError, nearest
from ftrun.groups import one_line
from ftrun.job import GROUPS
from ftrun.runs import read_json, steps_done
from ftrun.studies import ledger
from ftrun.studies.rows import curves_of, figures_of, row, rows_of
from ftrun.studies.study import as_value

# of a run's folder, in the order in which the page names them
_FILES = ("job.yaml", "result.json", "plan.json", "metrics.jsonl", "evals.jsonl", "log.txt", "adapter", "model")
# keys in which jobs may differ that compute the same; `arch` follows from the model that was named
_ASIDE = {"choices", "name", "out", "resume", "refuse", "debug", "log", "save_every", "kind", "arch"}
_ONE = ("model", "method", "rank", "layers", "targets", "quant", "lr", "steps")  # what is told of a single run
_ENDED = ("finished", "interrupted", "failed")


def gather(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of runs and studies, one after the other; of one study alone as its own page has them.

    Raises UserError on a folder that is neither, and on files that are damaged.
    """
    for folder in folders:
        _check(folder)
    if len(folders) == 1 and _is_study(folders[0]):
        return study_rows(folders[0])
    found: list[dict[str, Any]] = []
    for folder in folders:
        found += study_rows(folder) if _is_study(folder) else [run_row(folder)]
    shift = 0
    for number, one in enumerate(found, start=1):
        shift = number - one["number"]
        same = one["same_as"]
        one |= {"number": number, "same_as": same + shift if same is not None else None}
    return _with_axes(found)


def run_row(folder: Path) -> dict[str, Any]:
    """A run's row, without axes."""
    result = read_json(folder / "result.json")
    if result is not None and (not isinstance(result, dict) or result.get("status") not in _ENDED):
        raise UserError(f"{folder / 'result.json'}: damaged: expected an object whose status is {', '.join(_ENDED)}")
    try:
        figures, curves = figures_of(folder), curves_of(folder)
    except (AttributeError, TypeError) as error:
        raise UserError(f"{folder / 'result.json'}: damaged: {error}") from error
    status, reason = (result["status"], result.get("reason")) if result is not None else _unended(folder)
    return {**row(1, {}, status, reason, str(folder)), "figures": figures, **curves, "note": ""}


def study_rows(folder: Path) -> list[dict[str, Any]]:
    """A study's rows; of one that nobody is at work on nothing runs."""
    events = ledger.read(folder / "ledger.jsonl")
    try:
        rows = rows_of(events, folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'ledger.jsonl'}: damaged: an event lacks {error}") from error
    if not _is_free(folder):
        return rows
    for one in rows:
        if one["status"] == "running":
            one |= {"status": "interrupted", "reason": "the study was stopped; its command goes on with it"}
    return rows


def linked(rows: Iterable[dict[str, Any]], page: Path, studies: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """The rows with the addresses of their files, relative to the page's folder, and the commands that repeat them."""
    fixed = {study: _fixed(study) for study in studies}
    found = []
    for one in rows:
        run = Path(one["out"]) if one.get("out") else None
        there = [name for name in _FILES if run is not None and (run / name).exists()]
        links = {name: _address(run / name, page.parent) for name in there if run is not None}
        found.append({**one, "links": links, "command": _command(one, run, "job.yaml" in there, fixed)})
    return found


def _command(one: Mapping[str, Any], run: Path | None, has_job: bool, fixed: Mapping[Path, list[str]]) -> str:
    """The run again, in a folder of its own; of a point without one its values on top of the study's own."""
    if has_job and run is not None:
        return shlex.join(["ftrun", f"job={run / 'job.yaml'}", f"out={run}-again"])
    of = next((words for study, words in fixed.items() if run is None or study in run.parents), None)
    if of is None or one.get("status") == "same":
        return ""
    return shlex.join(["ftrun", *of, *(f"{key}={value}" for key, value in one["values"].items())])


def _address(file: Path, folder: Path) -> str:
    """A relative address; folders end in a slash."""
    address = quote(os.path.relpath(file, folder))
    return f"{address}/" if file.is_dir() else address


def objectives(study: Path) -> list[str]:
    """The figures that a study is judged by, the first one's order its table's."""
    search = _yaml(study / "study.yaml").get("search")
    found = search.get("objectives") if isinstance(search, Mapping) else None
    return [str(one) for one in found] if isinstance(found, list) and found else ["loss"]


def _fixed(study: Path) -> list[str]:
    found = _yaml(study / "study.yaml")
    return [str(word) for word in found.get("fixed") or []]


def _check(folder: Path) -> None:
    """UserError where the folder holds neither a run nor a study."""
    if not folder.is_dir():
        beside = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        near = nearest(folder.name, beside)
        hint = f" Did you mean {str(folder.parent / near)!r}?" if near else ""
        raise UserError(f"{folder}: {'a file' if folder.exists() else 'no such folder'}.{hint} Expected {_WANTED}")
    if _is_study(folder) or (folder / "job.yaml").is_file():
        return
    inside = sorted(p for p in folder.iterdir() if _is_study(p) or (p / "job.yaml").is_file())
    hint = f" It holds {len(inside)}, as {inside[0].name}: ftrun report {folder}/*." if inside else ""
    raise UserError(f"{folder}: neither job.yaml nor study.yaml lies there.{hint} Expected {_WANTED}")


_WANTED = "the folder of a run (runs/NAME) or of a study (studies/NAME)"


def _is_study(folder: Path) -> bool:
    return (folder / "study.yaml").is_file()


def _is_free(folder: Path) -> bool:
    try:
        lock.check_free(folder)
    except UserError:
        return False
    return True


def _unended(folder: Path) -> tuple[str, str | None]:
    """(status, reason) of a run without a result."""
    done = steps_done(folder)
    if not _is_free(folder):
        return "running", None
    return "interrupted", f"no result.json: it was ended from outside{f', saved after step {done}' if done else ''}"


# --- axes ---


def _with_axes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what differs between their jobs as values; a point that has no job.yaml keeps its own."""
    jobs = [_flat(Path(r["out"])) if r["out"] and (Path(r["out"]) / "job.yaml").is_file() else None for r in rows]
    there = [job for job in jobs if job is not None]
    names = list(dict.fromkeys(key for job in there for key in job))
    axes = [key for key in names if len({job[key] for job in there if key in job}) > 1]
    axes = [key for key in _first_of(axes) if not _follows(key, there)]
    if len(rows) == 1:
        axes = [key for key in _ONE if key in names]
    for one, job in zip(rows, jobs, strict=True):
        if job is not None:
            one["values"] = {key: job[key] for key in axes if key in job}
    return rows


def _first_of(axes: Sequence[str]) -> list[str]:
    """Without those that only repeat, for a part of the job, what a key at the root says."""
    return [key for key in axes if key.partition(".")[2] not in axes]


def _follows(key: str, jobs: Sequence[Mapping[str, str]]) -> bool:
    """Whether an option differs only because another choice of its group is taken."""
    group, dot, _ = key.partition(".")
    if not dot or group not in GROUPS:
        return False
    at: dict[str, set[str]] = {}
    for job in jobs:
        if key in job:
            at.setdefault(job.get(group, ""), set()).add(job[key])
    return all(len(values) == 1 for values in at.values())


def _flat(run: Path) -> dict[str, str]:
    """The keys of a job.yaml as they are typed, choices of groups first, with their values as they are typed."""
    tree = _yaml(run / "job.yaml")
    choices = tree.get("choices") if isinstance(tree.get("choices"), Mapping) else {}
    found = {str(group): str(choice) for group, choice in (choices or {}).items() if group not in ("log", "recipe")}
    root = {key: value for key, value in tree.items() if key not in _ASIDE and key not in GROUPS}
    found |= {str(key): as_value(value) for key, value in root.items()}
    for group in GROUPS:
        part = tree.get(group)
        if isinstance(part, Mapping) and group not in _ASIDE:
            found |= {f"{group}.{k}": as_value(v) for k, v in part.items() if k not in _ASIDE and root.get(k) != v}
    return found


def _yaml(path: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML: {one_line(error)}") from error
    if not isinstance(found, Mapping):
        raise UserError(f"{path}: expected a mapping, found {type(found).__name__}")
    return found
