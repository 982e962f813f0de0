"""The command line -> a composed configuration -> a Job. Hydra composes; the messages are ours."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.errors import UserError, nearest
from ftrun.groups import choices_of, compose_groups, conf_dir, keys_of, leaves, one_line, owners, study_of
from ftrun.job import GROUPS, ROOMS, STUDY_KEYS, STUDY_ROOMS, Job, make_job
from ftrun.replay import JobFile, read_job_file
from ftrun.shell import Override, escape, parse

__all__ = ["Composed", "changed", "choices_of", "compose", "compose_alone", "composed", "conf_dir", "sweep", "swept"]

# one of two says how long a run is: whoever names the one lets go of the other that a file or a recipe has set
_EXCLUSIVE = {"steps": "epochs", "epochs": "steps"}


@dataclass(frozen=True)
class Composed:
    """A command line, composed: OmegaConf's tree, interpolations alive; each group's choice; the names messages use."""

    tree: Any
    choices: dict[str, str]
    names: dict[str, str]
    references: dict[str, str]  # options that are keys at the root: "method.rank" -> "rank"

    def job(self) -> Job:
        """The typed job. Raises UserError on a value that is missing, of the wrong type or out of bounds."""
        return make_job(_resolved(self.tree, self.names), self.choices, self.names, set(self.references.values()))


def compose(arguments: Sequence[str], config_dirs: Sequence[Path] = ()) -> Job:
    """The job of a command line without its verb. Raises UserError on every mistake, before anything heavy loads."""
    return composed(arguments, config_dirs).job()


def compose_alone(arguments: Sequence[str], config_dirs: Sequence[Path] = ()) -> Job:
    """The one job of a command line without -m. Raises UserError where its recipe is a study, too."""
    job = compose(arguments, config_dirs)
    recipe = next((o.value for o in parse(arguments, multirun=False) if o.key == "recipe"), None)
    if recipe not in (None, "null") and study_of(str(recipe), config_dirs):
        raise UserError(f"recipe={recipe} is a study of several jobs: ftrun -m recipe={recipe}")
    return job


def changed(job: Job, arguments: Sequence[str], config_dirs: Sequence[Path] = ()) -> Job:
    """The job with some overrides on top, as job=FILE would have it. Raises UserError where they do not suit it."""
    file = JobFile(Path("job.yaml"), job.choices, {k: v for k, v in job.tree.items() if k != "choices"})
    return _composed(arguments, config_dirs, file).job()


def composed(arguments: Sequence[str], config_dirs: Sequence[Path] = ()) -> Composed:
    """The configuration of a command line: groups, then job=FILE, then the values, all keys known."""
    return _composed(arguments, config_dirs, None)


def _composed(arguments: Sequence[str], config_dirs: Sequence[Path], file: JobFile | None) -> Composed:
    from omegaconf import OmegaConf

    overrides = parse(arguments, multirun=False)
    chosen = {o.key: _choice(o) for o in overrides if o.key in GROUPS}
    values = [o for o in overrides if o.key not in (*GROUPS, "job")]
    file = file or _file(overrides, chosen)
    tree, choices = compose_groups({**(file.kept(chosen, config_dirs) if file else {}), **chosen}, config_dirs)
    _check_recipe(choices, config_dirs)
    raw = OmegaConf.to_container(tree, resolve=False)
    references = {path: text[2:-1] for path, text in leaves(raw, depth=2) if "." in path and _is_reference(text)}
    names = dict(references)
    known = {path for path, _ in leaves(raw, depth=2)} | set(ROOMS)
    if file:
        names |= _apply_file(file, tree, choices, references, known, config_dirs)
    names |= _apply(values, tree, references, known, choices, config_dirs)
    return Composed(tree, {g: choices[g] for g in ROOMS}, names, references)


def sweep(arguments: Sequence[str], config_dirs: Sequence[Path] = ()) -> list[list[str]]:
    """Every combination of a sweep, as command lines: Hydra's sweeps (a,b choice range glob), the last key fastest."""
    axes = []
    for one in parse(arguments, multirun=True):
        if one.interval is not None:
            raise UserError(f"{one.text}: an interval has no points of its own; name them, as {one.key}=1,2,3")
        axes.append([f"{one.sign}{one.key}={point}" for point in swept(one, config_dirs)] or [one.text])
    return [list(line) for line in itertools.product(*axes)]


def swept(one: Override, config_dirs: Sequence[Path] = ()) -> tuple[str, ...]:
    """The values of a swept override, those that a glob stands for included; () where it is not swept by points."""
    if one.glob is None:
        return one.points
    points = tuple(one.glob.filter(choices_of(one.key, config_dirs)))
    if not points:
        raise UserError(f"{one.text}: no {one.key} matches. There are {', '.join(choices_of(one.key, config_dirs))}")
    return points


def _choice(one: Override) -> str:
    group, name = one.key, one.value
    if one.sign and group != "recipe":
        raise UserError(f"{one.text}: the group {group} is there already; write {group}=NAME")
    if name is None and group == "recipe":
        return "null"
    if not isinstance(name, str | int) or name == "":
        known = ", ".join(choices_of(group))
        raise UserError(f"{one.text}: expected the name of one {group}: {known}. Its options are {group}.KEY=VALUE")
    return str(name)


def _file(overrides: Sequence[Override], chosen: Mapping[str, str]) -> JobFile | None:
    text = next((o.value for o in overrides if o.key == "job"), None)
    if text is not None and chosen.get("recipe", "null") != "null":
        raise UserError(f"job={text} and recipe={chosen['recipe']}: a job starts from one of them")
    if text == "":
        raise UserError("job=: expected the path of a job.yaml, as job=runs/one/job.yaml")
    return None if text is None else read_job_file(Path(text))


def _check_recipe(choices: Mapping[str, str], config_dirs: Sequence[Path]) -> None:
    """What a recipe sets, something in the composed job takes."""
    recipe = choices.get("recipe", "None")
    if recipe in ("None", "null"):
        return
    base, others = compose_groups({g: choices[g] for g in ROOMS}, config_dirs)
    for key in keys_of("recipe", recipe, config_dirs):
        group, _, option = key.partition(".")
        if group not in base or (option and group in ROOMS and option not in base[group]):
            raise UserError(f"recipe={recipe} sets {key}. {_not_taken(key, set(), others, config_dirs)}")


def _apply_file(
    file: JobFile,
    tree: Any,
    choices: Mapping[str, str],
    references: Mapping[str, str],
    known: set[str],
    config_dirs: Sequence[Path],
) -> dict[str, str]:
    """Set the file's values; returns how messages name them."""
    values = file.values(choices, config_dirs)
    for path, value in values.items():
        if path not in known:
            raise file.unknown(path, sorted(known))
        if path.endswith(".kind") and value != _get(tree, path):
            group = path.partition(".")[0]
            raise UserError(f"{file.shown}: {path}={value}: {group}={choices[group]} is {_get(tree, path)}")
        root = references.get(path)
        if root in values and values[root] != value:
            message = f"{path}={value} and {root}={values[root]} are one option; make them equal"
            raise UserError(f"{file.shown}: {message}")
        _set(tree, root or path, escape(value))
    shown = {path: f"{file.shown}: {references.get(path, path)}" for path in values}
    return shown | {path: shown[root] for path, root in references.items() if root in shown}


def _apply(
    values: Sequence[Override],
    tree: Any,
    references: Mapping[str, str],
    known: set[str],
    choices: Mapping[str, str],
    config_dirs: Sequence[Path],
) -> dict[str, str]:
    """Set the command line's values; returns how messages name them."""
    names, places = {}, {o.key: o for o in values}
    for one in values:
        _check_key(one, tree, known, choices, config_dirs)
        root = references.get(one.key)
        if root in places and places[root].value != one.value:
            raise UserError(f"{one.text} and {places[root].text}: {one.key} is {root}; give it once")
        if one.key in _EXCLUSIVE and _EXCLUSIVE[one.key] not in places and one.value is not None:
            _set(tree, _EXCLUSIVE[one.key], None)
        _set(tree, root or one.key, one.value)
        names[root or one.key] = one.key
        names |= {path: one.key for path, target in references.items() if target == (root or one.key)}
    return names


def _check_key(
    one: Override, tree: Any, known: set[str], choices: Mapping[str, str], config_dirs: Sequence[Path]
) -> None:
    group, _, option = one.key.partition(".")
    if option == "kind":
        raise UserError(f"{one.text}: the kind follows from the choice: {group}=NAME")
    if one.key in known:
        if one.sign == "+":
            raise UserError(f"{one.text}: {one.key} is there already; write {one.text[1:]}")
        return
    parent = ".".join(one.key.split(".")[:2])
    # inside an option that is a mapping, every name is free
    if parent in known and one.key.count(".") > 1 and not isinstance(_get(tree, parent), str | int | float | list):
        return
    raise _not_taken(one.key, known, choices, config_dirs)


class UnknownKey(UserError):
    """A key that no job has; `near`: the one that comes nearest, "" where none does."""

    def __init__(self, key: str, near: str, verb: str = "") -> None:
        guess = f" Did you mean {near!r}?" if near else ""
        help_ = f"ftrun {verb} --help" if verb else "ftrun --help"
        super().__init__(
            f"the key {key!r} is unknown.{guess} {help_} lists the keys, ftrun --cfg job all of this job's"
        )
        self.key, self.near = key, near


def _not_taken(key: str, known: set[str], choices: Mapping[str, str], config_dirs: Sequence[Path]) -> UserError:
    """Why nothing takes `key`: it belongs to another choice, or to none; and what comes nearest."""
    found = owners(key, config_dirs)
    if found:
        group, names = found
        listed = ", ".join(f"{group}={name}" for name in names[:8]) + (", …" if len(names) > 8 else "")
        return UserError(f"{key}: {group}={choices[group]} has no such option. It belongs to {listed}")
    if key.partition(".")[0] in (*STUDY_ROOMS, *STUDY_KEYS):
        return UserError(f"{key} belongs to a study of several jobs: ftrun -m {key}=…")
    last = key.rpartition(".")[2]
    same = sorted(path for path in known if path.rpartition(".")[2] == last)
    return UnknownKey(key, same[0] if same else nearest(key, sorted(known | set(GROUPS))) or "")


def _is_reference(text: Any) -> bool:
    return isinstance(text, str) and text[:2] == "${" and text[-1:] == "}" and text[2:-1].isidentifier()


def _get(tree: Any, path: str) -> Any:
    node: Any = tree
    for part in path.split("."):
        node = node._get_node(part) if node is not None and hasattr(node, "_get_node") else None
    return node._value() if node is not None and not hasattr(node, "_get_node") else node


def _set(tree: Any, path: str, value: Any) -> None:
    from omegaconf import OmegaConf

    *parents, last = path.split(".")
    node = tree
    for part in parents:
        if not OmegaConf.is_dict(node._get_node(part)) or node._is_interpolation():
            node[part] = {}
        node = node._get_node(part)
    node[last] = value


def _resolved(tree: Any, names: Mapping[str, str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        shown = names.get(key, key)
        raise UserError(f"{shown} is missing: give {shown}=…") from error
    except (OmegaConfBaseException, RecursionError) as error:
        key = str(getattr(error, "full_key", "") or "")
        shown = names.get(key, key)
        raise UserError(f"{shown}={_get(tree, key)}: {one_line(error)}" if key else one_line(error)) from error
