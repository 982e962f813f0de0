"""Sources of rows: which format reads a path, what a mix is made of, and whether it is all there.

Light: nothing here reads a row or imports more than the standard library.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ftrun import schema
from ftrun.data.options import DataOptions
from ftrun.data.record import Part
from ftrun.errors import UserError, unknown

# formats that a path's suffix tells
KINDS = ("jsonl", "json", "csv", "parquet", "text")


def check_sources(module: ModuleType, options: DataOptions) -> None:
    """UserError where the job's data are not there: cheap, to be asked before anything heavy is imported."""
    for one in [*parts(module, options), *held_out_parts(module, options)]:
        one.check()
    if options.template and options.template not in ("chatml", "plain"):
        template_file(options.template)


def template_file(template: str) -> Path:
    """The file of a template of the user's own. Raises UserError where there is none."""
    path = Path(os.path.expanduser(template))
    if not os.path.isfile(path):  # unlike pathlib's, it takes any name
        raise UserError(unknown("data.template: the template", template, ("chatml", "plain", "FILE.jinja")))
    return path


def parts(module: ModuleType, options: DataOptions) -> list[Part]:
    """The sources of a format: one, or a mix's several."""
    several = getattr(module, "parts", None)
    return several(options) if several else [part(module, options)]


def held_out_parts(module: ModuleType, options: DataOptions) -> list[Part]:
    """The sources of the held-out set that the user names, [] where it is split off."""
    apart = options.apart()
    if apart is None:
        return []
    made = _of_held_out(lambda: parts(module, apart))
    return [dataclasses.replace(one, check=functools.partial(_of_held_out, one.check)) for one in made]


def _of_held_out(act: Callable[[], Any]) -> Any:
    """What goes wrong with the held-out set is said of the key that named it."""
    try:
        return act()
    except UserError as error:
        said = re.sub(r"^data\.(?:sources\[0\]\.)?(path|split)", r"data.held_out_\1", str(error))
        raise UserError(said) from error


def part(module: ModuleType, options: DataOptions, weight: float | None = None) -> Part:
    """A format and its options as one source."""
    stamp, check = getattr(module, "fingerprint", None), getattr(module, "check", None)
    records = functools.partial(module.records, options)
    return Part(
        name=str(getattr(options, "path", "") or module.__name__.rsplit(".", 1)[-1]),
        options=options,
        records=records,
        fingerprint=functools.partial(stamp, options) if stamp else lambda: _hash_records(records),
        check=functools.partial(check, options) if check else lambda: None,
        weight=weight,
    )


def source(values: Mapping[str, Any], common: DataOptions, where: str) -> Part:
    """One entry of `data.sources` as a source: {path, kind, weight} and any option of its format."""
    values = {str(k): v for k, v in values.items()}
    weight, kind = values.pop("weight", None), values.pop("kind", None)
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0):
        raise UserError(f"{where}.weight={weight}: expected a number, more than 0")
    kind = kind or kind_of(str(values.get("path", "")), where)
    try:
        module = importlib.import_module(f"ftrun.data.formats.{kind}")
    except ModuleNotFoundError as error:
        raise UserError(unknown(f"{where}.kind: the format", kind, (*KINDS, "folder", "hub", "chatterbot"))) from error
    shared = {f.name: getattr(common, f.name) for f in dataclasses.fields(DataOptions)}
    shared = {k: v for k, v in shared.items() if k not in module.Options.FIXED}
    return part(module, schema.build(module.Options, {**shared, **values}, where), weight)


def kind_of(path: str, where: str) -> str:
    """The format that reads `path`, by its suffix; a folder by what lies in it."""
    full = Path(os.path.expanduser(path))
    if os.path.isfile(full / "state.json") or os.path.isfile(full / "dataset_dict.json"):
        return "folder"
    inside = sorted(p.name for p in full.rglob("*") if p.is_file()) if os.path.isdir(full) else [full.name]
    for name in inside:
        for kind in KINDS:
            if name.lower().endswith(importlib.import_module(f"ftrun.data.formats.{kind}").SUFFIXES):
                return kind
    raise UserError(
        f"{where}.path={path}: expected a .jsonl, .json, .csv, .tsv, .parquet or .txt file, "
        "a folder of such files or of datasets.save_to_disk; or name the format, {path: …, kind: jsonl}"
    )


def _hash_records(records: Any) -> str:
    # a format from outside may bring no fingerprint of its own: its rows are read once more
    total = hashlib.sha256()
    for where, record in records():
        total.update(json.dumps([where, record], default=repr, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return total.hexdigest()
