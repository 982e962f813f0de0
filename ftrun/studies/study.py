"""`ftrun -m …` read: what is swept, what stays, how the points are searched and where they run."""

from __future__ import annotations

import hashlib
import re
import shlex
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ftrun import schema
from ftrun.compose import swept
from ftrun.errors import UserError, unknown
from ftrun.groups import choices_of, find_choice, one_line, read_choice, study_of
from ftrun.job import GROUPS, STUDY_KEYS, STUDY_ROOMS, Job, Part, find_variant, make_part
from ftrun.runs import aside, differences, listed
from ftrun.secrets import hidden, hide
from ftrun.shell import Override, parse, plain, quote

_USUAL = {"search": "grid", "launcher": "local"}
# a study goes on where these differ; so it does for what its search says that it may grow by
_FREE = ("command", "launcher")


@dataclass(frozen=True)
class Axis:
    """A swept key: its points as an override writes them, or the interval that they lie in."""

    key: str
    points: tuple[str, ...] = ()
    sign: str = ""
    low: float | None = None
    high: float | None = None
    log: bool = False

    @property
    def is_interval(self) -> bool:
        """Whether the values are any number between `low` and `high`, both of them included."""
        return self.low is not None

    @property
    def integer(self) -> bool:
        """Whether an interval's numbers are whole."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True)
class Study:
    """A study as it was asked for. fixed: overrides of every job, as typed."""

    folder: Path
    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]
    search: Part
    launcher: Part
    config_dirs: tuple[Path, ...] = ()
    command: tuple[str, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """What the study is called: its folder's name."""
        return self.folder.name

    def as_dict(self) -> dict[str, Any]:
        """What study.yaml holds."""
        return {
            "command": ["ftrun", "-m", *self.command],
            "fixed": list(self.fixed),
            "axes": {a.key: list(a.points) or _interval(a) for a in self.axes},
            "search": {"kind": self.search.kind, **_options(self.search)},
            "launcher": {"kind": self.launcher.kind, **_options(self.launcher)},
        }


def read_study(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> Study:
    """The study of a command line without its verb. Raises UserError on what is no study; composes no job yet."""
    lines = [*_recipe_lines(overrides, config_dirs), *overrides]
    given = {one.key: one for one in parse(lines, multirun=True)}
    parts = {group: _part(group, given, config_dirs) for group in STUDY_ROOMS}
    place, name = given.pop("out", None), given.pop("name", None)
    for one in (place, name):
        if one is not None and one.points:
            raise UserError(f"{one.text}: a study has one folder; each of its jobs gets one of its own within")
    axes, fixed = [], []
    for one in given.values():
        points = swept(one, config_dirs)
        if one.interval is not None:
            axes.append(_bounds(one))
        elif points:
            # Hydra escapes a colon in what it hands back; nobody types it so
            axes.append(Axis(one.key, tuple(dict.fromkeys(p.replace("\\:", ":") for p in points)), one.sign))
        else:
            fixed.append(one.text)
    folder = _folder(place, name, given, axes, fixed, parts)
    return Study(
        folder, tuple(fixed), tuple(axes), parts["search"], parts["launcher"], tuple(config_dirs), tuple(overrides)
    )


def record(study: Study) -> None:
    """study.yaml, without secrets, in the study's folder. Raises UserError where another study lies there, with the
    difference.
    """
    path = study.folder / "study.yaml"
    there = _read(path)
    now = hidden(study.as_dict())
    if there is None and study.folder.is_dir() and any(p.name[0] != "." for p in study.folder.iterdir()):
        raise UserError(f"out={study.folder}: the folder is not empty and holds no study (no study.yaml); name another")
    if there is not None:
        free = (*_FREE, *getattr(type(study.search.options), "grows", ()))
        same = {"fixed": sorted(map(str, there.get("fixed") or []))} if isinstance(there, Mapping) else {}
        before, after = {**there, **same}, {**now, "fixed": sorted(now["fixed"])}
        changes = [c for c in differences(before, after) if not any(_is_of(c[0], one) for one in free)]
        if changes:
            raise UserError(
                f"out={study.folder}: another study lies there.\n{listed(changes)}\nName another: name=NAME or out=DIR"
            )
    with aside(path) as beside:
        text = yaml.safe_dump(now, sort_keys=False, allow_unicode=True)
        words = " ".join(shlex.join(now["command"]).split())
        beside.write_text(f"# {words}    goes on with this study\n{text}", encoding="utf-8")


def _is_of(path: str, free: str) -> bool:
    return path == free or path.startswith(f"{free}.")


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML: {one_line(error)}") from error


def _recipe_lines(overrides: Sequence[str], config_dirs: Sequence[Path]) -> list[str]:
    """What the recipe sweeps; what the command line gives the same key comes on top."""
    recipe = next((o.value for o in parse(overrides, multirun=True) if o.key == "recipe" and not o.points), None)
    return [] if recipe in (None, "null") else study_of(str(recipe), config_dirs)


def _part(group: str, given: dict[str, Override], config_dirs: Sequence[Path]) -> Part:
    """The study's search or launcher, its own options taken out of `given`."""
    chosen = given.pop(group, None)
    name = str(chosen.value) if chosen is not None else _USUAL[group]
    if chosen is not None and (chosen.points or not isinstance(chosen.value, str | int)):
        raise UserError(f"{chosen.text}: expected one {group}: {', '.join(choices_of(group, config_dirs))}")
    tree = dict(read_choice(find_choice(group, name, config_dirs))[0])
    names = {}
    own = schema.field_types(schema.read_options(find_variant(group, str(tree.get("kind", "")))[1]))
    for key in [k for k in given if STUDY_KEYS.get(k, k).startswith(f"{group}.")]:
        one, option = given.pop(key), STUDY_KEYS.get(key, key).partition(".")[2]
        head, _, inner = option.partition(".")
        if inner and typing.get_origin(own.get(head)) is dict and one.value is not None:
            tree[head] = {**(tree.get(head) or {}), inner: one.value}
            continue
        if option not in own:
            message = f"{group}={name} has no such option"
            raise UserError(f"{one.text}: {message}. {unknown(f'{group}.', option, own) if own else ''}".rstrip(". "))
        if one.points or one.interval is not None:
            raise UserError(f"{one.text}: an option of the study itself is not swept. A list is written [a,b]")
        tree[option] = one.value
        names[f"{group}.{option}"] = key
    return make_part(group, tree, name, names)


def _bounds(one: Override) -> Axis:
    low, high = one.interval.start, one.interval.end
    log = "log" in one.interval.tags
    if not low < high or (log and low <= 0):
        raise UserError(f"{one.text}: expected interval(LOW, HIGH), the lower number first{', above 0' if log else ''}")
    return Axis(one.key, (), one.sign, low, high, log)


def _interval(axis: Axis) -> str:
    text = f"interval({axis.low},{axis.high})"
    return f"tag(log,{text})" if axis.log else text


def _options(part: Part) -> dict[str, Any]:
    return {key: getattr(part.options, f.name) for key, f in schema.fields_by_key(type(part.options)).items()}


def _folder(
    place: Override | None,
    name: Override | None,
    given: Mapping[str, Override],
    axes: Sequence[Axis],
    fixed: Sequence[str],
    parts: Mapping[str, Part],
) -> Path:
    """out=DIR, studies/NAME, or a name that the same study has again: the same command goes on where it stopped."""
    if place is not None and place.value is not None:
        return Path(str(place.value))
    if name is not None and name.value is not None:
        pattern = schema.fields_by_key(Job)["name"].metadata["pattern"]
        if not re.fullmatch(pattern, str(name.value)):
            raise UserError(f"{name.text}: expected a folder's name without /, for studies/NAME (else: out=DIR)")
        return Path("studies") / str(name.value)
    recipe = given.get("recipe")
    words = [str(recipe.value)] if recipe is not None else [a.key.rpartition(".")[2] for a in axes]
    if parts["search"].choice != "grid" and recipe is None:
        words.append(parts["search"].choice)
    extra = sorted(text for text in fixed if not text.startswith("recipe="))
    extra += _own(parts["search"])
    digest = hashlib.sha256("\n".join([*extra, parts["search"].choice]).encode()).hexdigest()[:6]
    words += [digest] if extra else []
    return Path("studies") / (re.sub(r"[^\w.-]+", "_", "-".join(words)) or "one")


def _own(search: Part) -> list[str]:
    """The search's options that are not as they are by default, but for those that a study may grow by."""
    cls, free = type(search.options), getattr(type(search.options), "grows", ())
    usual = Part(search.choice, search.kind, search.module, cls())
    mine, theirs = _options(search), _options(usual)
    return [f"search.{k}={v}" for k, v in mine.items() if v != theirs[k] and f"search.{k}" not in free]


def label(values: Mapping[str, str]) -> str:
    """dora-rank8-lr0.001: what tells a point from the others, fit for a folder's name."""
    words = []
    for key, value in values.items():
        text = hide(str(plain(key, value)) if value[:1] in "'\"" else value)
        words.append(text if key in GROUPS else key.rpartition(".")[2] + text)
    return re.sub(r"[^\w.-]+", "_", "-".join(words))[:100].strip("_") or "one"


def as_value(value: Any) -> str:
    """A Python value as an override writes it; text that is no plain word is quoted."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(as_value, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{as_value(key)}:{as_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, int | float):
        return repr(value)
    return value if re.fullmatch(r"[\w.:/+-]+", value) else quote(value)
