"""Typed options: how a field is declared, how a YAML value is checked against it, and how the
options of a variant are read from its file without importing the file.

A variant's file holds its maths and a frozen dataclass called `Options`. The maths needs torch, which
takes seconds to import; a mistyped key must be answered at once. So `read_options` runs only the
part of the file that declares `Options`: the imports of the names that it uses, and the class itself.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ftrun.errors import UserError, nearest, unknown

_BOUNDS = {"ge": "{} or more", "gt": "more than {}", "le": "{} or less", "lt": "less than {}"}


def option(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[Any, ...] | None = None,
    pattern: str | None = None,
    form: str | None = None,
    alias: str | None = None,
) -> Any:
    """A dataclass field with its default, one line on meaning and unit, and its bounds.

    Bounds apply to numbers and to each element of a list or value of a mapping; None is admitted where the type says
    so. form: what a user types, where the type does not say it. alias: the key in the YAML where Python cannot use it
    as a name ("from").
    """
    bounds = {k: v for k, v in (("ge", ge), ("gt", gt), ("le", le), ("lt", lt)) if v is not None}
    meta = {"doc": doc, "bounds": bounds, "choices": choices, "pattern": pattern, "form": form, "alias": alias}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def build(cls: type, values: Mapping[str, Any], where: str = "", names: Mapping[str, str] | None = None) -> Any:
    """An instance of the dataclass `cls` from YAML values.

    where: the dotted path of the values, for messages ("method"). names: what the user calls a path
    ("method.rank" -> "rank"). Raises UserError on an unknown key, a wrong type, a value out of bounds.
    """
    hints, fields = field_types(cls), fields_by_key(cls)
    made = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        shown = (names or {}).get(path, path)
        if key not in hints:
            raise UserError(unknown(f"{where or 'root'}: the key", key, hints))
        field = fields[key]
        made[field.name] = check(hints[key], value, field.metadata, shown)
    try:
        return cls(**made)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error


def check(hint: Any, value: Any, meta: Mapping[str, Any], shown: str) -> Any:
    """`value` as the type `hint`, within the bounds of `meta`; UserError that names `shown` otherwise."""
    ok, made = _convert(hint, value)
    wanted = describe(hint, meta)
    if not ok:
        raise UserError(f"{shown}={_show(value)}: expected {wanted}, found {_found(hint, value)}{_hint(value, meta)}")
    for item in _items(made):
        if item is not None and not _within(item, meta):
            raise UserError(f"{shown}={_show(value)}: expected {wanted}{_hint(item, meta)}")
    return made


def describe(hint: Any, meta: Mapping[str, Any]) -> str:
    """What a field takes, in words: "an integer, 1 or more"."""
    if meta.get("form"):
        return str(meta["form"])
    words = _words(hint)
    if meta.get("choices"):
        words = "one of " + ", ".join("null" if c is None else str(c) for c in meta["choices"])
    bounds = [text.format(meta["bounds"][k]) for k, text in _BOUNDS.items() if k in meta.get("bounds", {})]
    text = ", ".join([words, " and ".join(bounds)] if bounds else [words])
    return f"{text} ({meta['doc']})" if meta.get("pattern") else text


def field_types(cls: type) -> dict[str, Any]:
    """The dataclass's fields, by their keys in the YAML, and their resolved types, in order."""
    hints = typing.get_type_hints(cls)
    return {key: hints[field.name] for key, field in fields_by_key(cls).items()}


def fields_by_key(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The dataclass's fields by their keys in the YAML: the name, or the alias that `option` gave."""
    return {f.metadata.get("alias") or f.name: f for f in dataclasses.fields(cls) if f.init}


def _convert(hint: Any, value: Any) -> tuple[bool, Any]:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True, value
    if origin in (types.UnionType, typing.Union):
        return _convert_union(typing.get_args(hint), value)
    if origin in (list, tuple) or hint in (list, tuple):
        return _convert_list(origin or hint, typing.get_args(hint), value)
    if origin is dict or hint is dict:
        return _convert_dict(typing.get_args(hint), value)
    return _convert_scalar(hint, value)


def _convert_scalar(hint: Any, value: Any) -> tuple[bool, Any]:
    if hint is type(None):
        return value is None, None
    if hint is float:
        # YAML 1.1 reads 1e-4 as text; a user means the number
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
            value = float(value)
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return ok, float(value) if ok else None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, hint), value


def _convert_union(members: tuple[Any, ...], value: Any) -> tuple[bool, Any]:
    for member in members:
        ok, made = _convert(member, value)
        if ok:
            return True, made
    return False, None


def _convert_list(kind: type, args: tuple[Any, ...], value: Any) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, None
    pairs = [_convert(args[0], item) if args else (True, item) for item in value]
    return all(ok for ok, _ in pairs), kind(item for _, item in pairs)


def _convert_dict(args: tuple[Any, ...], value: Any) -> tuple[bool, Any]:
    if not isinstance(value, Mapping):
        return False, None
    pairs = {str(k): _convert(args[1], v) if args else (True, v) for k, v in value.items()}
    return all(ok for ok, _ in pairs.values()), {k: made for k, (_, made) in pairs.items()}


def _items(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    return list(value.values()) if isinstance(value, dict) else [value]


def _within(value: Any, meta: Mapping[str, Any]) -> bool:
    if meta.get("choices") and value not in meta["choices"]:
        return False
    if meta.get("pattern") and isinstance(value, str) and not re.fullmatch(meta["pattern"], value):
        return False
    if not isinstance(value, int | float) or isinstance(value, bool):
        return True
    return all(getattr(operator, name)(value, bound) for name, bound in meta.get("bounds", {}).items())


def _hint(value: Any, meta: Mapping[str, Any]) -> str:
    close = nearest(str(value), map(str, meta.get("choices") or ()))
    return f". Did you mean {close!r}?" if close else ""


def _words(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_words(a) for a in args)
    if origin in (list, tuple):
        return "a list [a,b]" + _ELEMENTS.get(args[0], "")
    if origin is dict:
        return f"a mapping {{key: {_words(args[1])}}}" if args else "a mapping {key: value}"
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


_ELEMENTS = {str: " of text", int: " of integers", float: " of numbers"}


def _found(hint: Any, value: Any) -> str:
    """What a value of the wrong type is; of a list, its first element that is none of those wanted."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    of = next((typing.get_args(m)[0] for m in members if typing.get_origin(m) in (list, tuple)), None)
    if of is None or not isinstance(value, list):
        return _kind(value)
    wrong = next((item for item in value if not _convert(of, item)[0]), None)
    quoted = f"; as text it is ['{wrong}']" if of is str and isinstance(wrong, int | float) else ""
    return f"a list with {_show(wrong)}, {_kind(wrong)}{quoted}"


def _show(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 160 else f"{text[:120]}…"


def _kind(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "what is no number" if math.isnan(value) else "infinity, or a number too large"
    names = {bool: "true/false", int: "an integer", float: "a number", str: "text", type(None): "null"}
    return names.get(type(value), "a list" if isinstance(value, list) else "a mapping")


@functools.cache
def read_options(path: Path) -> type:
    """The class `Options` of the Python file at `path`, without running the rest of the file.

    Runs what `Options` names, and what that names: imports, constants, functions, classes. Heavy imports stay
    untouched. Raises KeyError where the file declares no `Options`.
    """
    return _read(path, "Options")


@functools.cache
def read_check(path: Path, name: str = "check") -> Callable[[Any], None] | None:
    """The function `check(options)` of a variant's file, or another, read in the same way; None where it has none.

    It says what is wrong on this machine (no such file, no such package) before anything heavy is imported.
    """
    try:
        return _read(path, name)
    except KeyError:
        return None


def _read(path: Path, name: str) -> Any:
    """The object `name` of the file at `path`, from those of its statements that it needs."""
    statements = ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body
    needed: set[int] = set()
    wanted, before = {name}, 0
    while len(wanted) > before:
        before = len(wanted)
        for index, node in enumerate(statements):
            if _defined(node) & wanted:
                needed.add(index)
                wanted |= _named(node)
    if not any(name in _defined(statements[index]) for index in needed):
        raise KeyError(f"{path} declares no {name}")
    future = [n for n in statements if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    kept = [statements[i] for i in sorted(needed) if statements[i] not in future]
    module = types.ModuleType(f"{name} of {path}")
    # dataclasses look their module up to resolve annotations
    sys.modules[module.__name__] = module
    exec(compile(ast.Module([*future, *kept], []), str(path), "exec"), module.__dict__)
    return module.__dict__[name]


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ImportFrom | ast.Import):
        return {(a.asname or a.name).split(".")[0] for a in node.names}
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {t.id for t in node.targets if isinstance(t, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return set()


def _named(node: ast.AST) -> set[str]:
    """The names that a statement needs in order to run; a function's annotations are never evaluated."""
    if isinstance(node, ast.arg):
        return set()
    if isinstance(node, ast.Name):
        return {node.id}
    own: set[str] = set()
    for field, child in ast.iter_fields(node):
        if field == "returns":
            continue
        for one in child if isinstance(child, list) else [child]:
            own |= _named(one) if isinstance(one, ast.AST) else set()
    return own
