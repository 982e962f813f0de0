"""What the shell hands over, in Hydra's grammar: free text, paths and patterns reach the user's meaning."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.errors import UserError
from ftrun.job import GROUPS

# keys whose value is one piece of text, whatever it holds
_TEXT = re.compile(r"prompt|run|out|job|repo|name|(\w+\.)+(prompt|text|template|system|from|revision|name|pattern)")
# keys that name a file or a folder: text, or a list of them
_PATH = re.compile(r"(\w+\.)+(path|\w+_path)")
# patterns on module names, text too
_PATTERN = re.compile(r"(method\.)?targets")
# longer values are read as YAML: the time of Hydra's grammar grows with the square of the length
_LONG = 500
_DEEP = 20
_HOME = ("run", "out", "job", "repo", "path", "from")


@dataclass(frozen=True)
class Override:
    """One KEY=VALUE of the command line, read. `value` is in OmegaConf's terms: literal `${` is escaped."""

    text: str  # as typed
    key: str
    value: Any
    sign: str = ""  # "", "+" or "++"
    points: tuple[str, ...] = ()  # of a sweep: each value, as an override writes it
    glob: Any = None  # of a sweep over the choices that match a pattern
    interval: Any = None  # of a sweep without points of its own: Hydra's IntervalSweep


def quote(text: str) -> str:
    """`text` as one quoted string of Hydra's grammar, in which nothing has a meaning of its own."""
    text = re.sub(r"(\\*)'", lambda m: m.group(1) * 2 + "\\'", text)
    return "'" + re.sub(r"(\\+)$", lambda m: m.group(1) * 2, text) + "'"


def unquote(text: str) -> str | None:
    """The text of one quoted string of Hydra's grammar; None where `text` is no such string."""
    mark, inner = text[:1], text[1:-1]
    if len(text) < 2 or mark not in ("'", '"') or text[-1] != mark:
        return None
    backslashes = [len(m.group(1)) for m in re.finditer(rf"(\\*){mark}", inner)]
    tail = len(inner) - len(inner.rstrip("\\"))
    if tail % 2 or not all(n % 2 for n in backslashes):
        return None
    inner = inner[: len(inner) - tail // 2]
    return re.sub(rf"(\\+){mark}", lambda m: "\\" * (len(m.group(1)) // 2) + mark, inner)


def escape(value: Any) -> Any:
    """A value in which OmegaConf finds no interpolation: `${` stays two characters."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda m: m.group(1) * 2 + "\\${", value)
    if isinstance(value, Mapping):
        return {k: escape(v) for k, v in value.items()}
    return [escape(v) for v in value] if isinstance(value, list | tuple) else value


def as_override(value: Any) -> str:
    """What `plain` gave, in Hydra's grammar."""
    if isinstance(value, list):
        return "[" + ",".join(map(as_override, value)) + "]"
    return "null" if value is None else quote(value)


def as_hydra(one: Override) -> str:
    """An override as Hydra itself would read it."""
    if is_text(one.key, one.text.partition("=")[2]):
        return f"{one.sign}{one.key}={as_override(one.value)}"
    return one.text


def is_text(key: str, value: str) -> bool:
    """Whether the value of `key` is taken as it stands."""
    if _PATTERN.fullmatch(key):
        return value.startswith("re:")
    return bool(_TEXT.fullmatch(key) or _PATH.fullmatch(key))


def plain(key: str, value: str) -> Any:
    """The value of a key that takes text: without its quotes, `~` expanded; a list of paths, None for null."""
    if value == "null":
        return None
    inner = unquote(value)
    if inner is None and _PATH.fullmatch(key) and re.fullmatch(r"\[.*\]", value, re.DOTALL) and not _exists(value):
        return [plain(key, piece.strip()) for piece in _pieces(value[1:-1])]
    text = value if inner is None else inner
    is_place = key.rpartition(".")[2] in _HOME or _PATH.fullmatch(key)
    return _at_home(text) if is_place and re.match(r"~(/|$)", text) else text


def _at_home(text: str) -> str:
    try:
        return str(Path.home()) + text[1:]
    except RuntimeError as error:
        raise UserError(f"{_short(text)}: this user has no home folder; set HOME, or write the path out") from error


def parse(arguments: Iterable[str], multirun: bool) -> list[Override]:
    """The overrides, in order; of one key given twice the last rules, as in Hydra, so that scripts can append.

    Raises UserError on what is no override.
    """
    parsed: dict[str, Override] = {}
    for argument in arguments:
        one = _parse_one(argument, multirun)
        parsed.pop(one.key, None)
        parsed[one.key] = one
    return list(parsed.values())


def _parse_one(argument: str, multirun: bool) -> Override:
    sign, left, value = _split(argument)
    if is_text(left, value):
        points = _points(left, value) if multirun else ()
        return Override(argument, left, escape(plain(left, value)), sign, points)
    if left in GROUPS and not re.search(r"[,(\[{]", value):
        inner = unquote(value)
        return Override(argument, left, value if inner is None else inner, sign)
    return _read(argument, left, value, sign, multirun)


def _split(argument: str) -> tuple[str, str, str]:
    """(sign, key, value); UserError on what Hydra knows and a job does not have."""
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{_short(ascii(argument))}: not valid UTF-8") from None
    match = re.match(r"([~+]*)([^=]*)(=?)(.*)", argument, re.DOTALL)
    sign, key, equals, value = match.groups() if match else ("", argument, "", "")
    if sign.startswith("~"):
        raise UserError(f"{_short(argument)}: nothing can be taken out of a job; choose another value: {key}=…")
    if key.startswith(("hydra.", "hydra/")):
        raise UserError(
            f"{_short(argument)}: Hydra only composes here. The run's folder is out=DIR, sweeps run with -m"
        )
    if not equals:
        raise UserError(f"{_short(argument)!r}: expected KEY=VALUE, a verb first, or a flag; see ftrun --help")
    if not re.fullmatch(r"[A-Za-z_][\w-]*(\.[^.=\s]+)*", key) or sign not in ("", "+", "++"):
        raise UserError(f"{_short(argument)}: {_short(sign + key)!r} is no key. Expected KEY=VALUE, as method.rank=8")
    return sign, key, value


def _read(argument: str, key: str, value: str, sign: str, multirun: bool) -> Override:
    """An override whose value Hydra's grammar reads: numbers, lists, mappings, sweeps."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException

    if _depth(value) > _DEEP:
        raise UserError(f"{_short(argument)}: not understood: brackets within brackets, {_depth(value)} deep")
    if len(value) > _LONG and not multirun:
        collection = _as_yaml(value)
        return Override(argument, key, escape(value) if collection is None else collection, sign)
    mapping = _as_yaml(value) if value.startswith(("{", "[{")) and ": " in value else None
    if mapping is not None:
        return Override(argument, key, mapping, sign)
    try:
        one = OverridesParser.create().parse_override(f"key={value}")
    except (HydraException, RecursionError, ValueError) as error:
        collection = _as_yaml(value)
        if collection is not None:
            return Override(argument, key, collection, sign)
        form = as_override(value) if len(value) < 80 else "'…'"
        raise UserError(f'{_short(argument)}: not understood. As text it is written "{key}={form}"') from error
    if not one.is_sweep_override():
        return Override(argument, key, one.value(), sign)
    if not multirun:
        as_list = "" if key in GROUPS else f". One value that is a list is written {key}=[{_short(value)}]"
        raise UserError(f"{_short(argument)}: several values; add -m to run each of them{as_list}")
    if isinstance(one.value(), Glob):
        return Override(argument, key, None, sign, glob=one.value())
    if not one.is_discrete_sweep():
        return Override(argument, key, None, sign, interval=one.value())
    return Override(argument, key, None, sign, tuple(one.sweep_string_iterator()))


def _depth(value: str) -> int:
    """How deep brackets nest at most, quotes not considered."""
    steps = itertools.accumulate((c in "[{(") - (c in "]})") for c in value)
    return max(steps, default=0)


def _as_yaml(value: str) -> Any:
    """A list or a mapping in YAML's own notation, which takes any key in quotes; None where it is neither."""
    import yaml

    try:
        made = yaml.load(value, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if value[:1] in ("{", "[") else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return escape(made) if isinstance(made, list | dict) else None


def _points(key: str, value: str) -> tuple[str, ...]:
    """The values of a swept path: a.jsonl,b.jsonl. One whole path that holds a comma is no sweep."""
    if not _PATH.fullmatch(key) or unquote(value) is not None or _exists(value):
        return ()
    pieces = _pieces(value)
    return tuple(as_override(plain(key, p)) for p in pieces) if len(pieces) > 1 else ()


def _pieces(text: str) -> list[str]:
    """`text` cut at its commas, those in quotes and brackets left alone."""
    found = re.findall(r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\[[^\]]*\]|\{[^}]*\}|[^,])+""", text)
    return [piece for piece in found if piece.strip()]


def _exists(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:120]}… ({len(text)} characters)"
