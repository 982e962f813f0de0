"""What lies in conf/ and recipes/: each group's choices, the keys that a choice sets, and their composition by Hydra.

Hydra's loader is used without its application around it: no plugin scan, no settings of its own, so that one
composition takes milliseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ftrun.errors import UserError, unknown
from ftrun.job import GROUPS

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def conf_dir() -> Path:
    """The folder of the YAML files: beside the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parent / "conf"
    return (inside if inside.is_dir() else Path(__file__).parent.parent / "conf").resolve()


def folders(group: str, config_dirs: Sequence[Path] = ()) -> list[Path]:
    """Where the choices of a group lie: ours first, then those of --config-dir."""
    if group == "recipe":
        return [conf_dir().parent / "recipes", *(d / "recipes" for d in config_dirs)]
    return [d / group for d in (conf_dir(), *config_dirs)]


def choices_of(group: str, config_dirs: Sequence[Path] = ()) -> list[str]:
    """The names that GROUP=NAME takes, sorted."""
    return sorted({p.stem for folder in folders(group, config_dirs) for p in folder.glob("*.yaml")})


def defaults() -> dict[str, str]:
    """Each group's choice where nobody chooses."""
    entries = read_choice(conf_dir() / "config.yaml")[0]["defaults"]
    return {str(k): str(v) for entry in entries if isinstance(entry, dict) for k, v in entry.items()}


def find_choice(group: str, name: str, config_dirs: Sequence[Path] = ()) -> Path:
    """The YAML of GROUP=NAME. Raises UserError on an unknown name."""
    for folder in folders(group, config_dirs):
        # a name is no path: nothing outside the folder can be reached by it
        if Path(name).name == name and (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise UserError(unknown(f"{group}={name}: the {group}", name, choices_of(group, config_dirs), listed=24))


@functools.cache
def read_choice(path: Path) -> tuple[dict[str, Any], bool]:
    """(the YAML's content, whether its keys are meant for the root). Raises UserError on what is no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.load(text, _Loader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of options, found {type(tree).__name__}")
    return tree, any("@package _global_" in line for line in text.splitlines()[:5])


def keys_of(group: str, name: str, config_dirs: Sequence[Path] = ()) -> set[str]:
    """The dotted keys that a choice sets in the composed tree, those that it inherits included."""
    tree, at_root = read_choice(find_choice(group, name, config_dirs))
    own = {k: v for k, v in tree.items() if k not in ("defaults", "study")}
    keys = {path for path, _ in leaves(own if at_root else {group: own}, depth=2)}
    for inherited in tree.get("defaults", []):
        if isinstance(inherited, str) and inherited != "_self_":
            keys |= keys_of(group, inherited, config_dirs)
    return keys


def overrides_of(group: str, name: str, config_dirs: Sequence[Path] = ()) -> dict[str, str]:
    """The choices of other groups that a choice brings with it: {"quant": "nf4"} for method=qlora."""
    found: dict[str, str] = {}
    for entry in read_choice(find_choice(group, name, config_dirs))[0].get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            found |= overrides_of(group, entry, config_dirs)
        for key, value in entry.items() if isinstance(entry, dict) else ():
            if str(key).startswith("override "):
                found[str(key).removeprefix("override ").strip().lstrip("/")] = str(value)
    return found


def owners(key: str, config_dirs: Sequence[Path] = ()) -> tuple[str, list[str]] | None:
    """The group, and those of its choices, that set `key`; None where nothing does."""
    for group in GROUPS:
        names = [n for n in choices_of(group, config_dirs) if key in keys_of(group, n, config_dirs)]
        if names:
            return group, names
    return None


def leaves(tree: Any, prefix: str = "", depth: int = -1) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of what a nested mapping holds, down to `depth` keys (-1: all the way)."""
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(value, Mapping) and value and depth != 1:
            yield from leaves(value, f"{prefix}{key}.", depth - 1)
        else:
            yield f"{prefix}{key}", value


def compose_groups(chosen: Mapping[str, str], config_dirs: Sequence[Path] = ()) -> tuple[Any, dict[str, str]]:
    """(the tree of OmegaConf, each group's choice) for some groups' choices; the others stay at their defaults.

    Raises UserError on an unknown choice and on a YAML that Hydra cannot compose.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_repository import CachingConfigRepository
    from hydra._internal.defaults_list import create_defaults_list
    from hydra.core.override_parser.types import Override, OverrideType, ValueType
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    for group, name in chosen.items():
        if (group, name) != ("recipe", "null"):
            find_choice(group, name, config_dirs)
    if chosen.get("recipe", "null") != "null":
        _store_recipe(chosen["recipe"], config_dirs)
    loader = ConfigLoaderImpl(_search_path(config_dirs))
    repository = CachingConfigRepository(loader.repository)
    kinds = OverrideType.CHANGE, ValueType.ELEMENT
    overrides = [
        Override(kinds[0], g, kinds[1], None if c == "null" else c, input_line=f"{g}={c}") for g, c in chosen.items()
    ]
    try:
        plan = create_defaults_list(repository, "config", overrides, prepend_hydra=False, skip_missing=False)
        cfg = loader._compose_config_from_defaults_list(defaults=plan.defaults, repo=repository)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(one_line(error)) from error
    return cfg, {g: str(c) for g, c in plan.overrides.known_choices.items() if g in GROUPS}


def _search_path(config_dirs: Sequence[Path]) -> Any:
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource
    from hydra._internal.sources_registry import SourcesRegistry

    # what a scan of Hydra's plugins would have done
    for source in (FileConfigSource, StructuredConfigSource):
        SourcesRegistry.instance().register(source)
    path = ConfigSearchPathImpl()
    path.append("main", f"file://{conf_dir()}")
    for folder in config_dirs:
        path.append("command-line", f"file://{folder.resolve()}")
    path.append("schema", "structured://")
    return path


def _store_recipe(name: str, config_dirs: Sequence[Path]) -> None:
    """Make recipes/NAME.yaml the choice NAME of the group `recipe`, its keys meant for the root."""
    from hydra.core.config_store import ConfigStore

    tree, _ = read_choice(find_choice("recipe", name, config_dirs))
    node = {k: v for k, v in tree.items() if k != "study"}
    ConfigStore.instance().store(group="recipe", name=name, node=node, package="_global_")


def study_of(recipe: str, config_dirs: Sequence[Path] = ()) -> list[str]:
    """What a recipe sweeps: its list `study`, lines as they are typed after `ftrun -m`; [] where it is a single job."""
    path = find_choice("recipe", recipe, config_dirs)
    lines = read_choice(path)[0].get("study") or []
    if not isinstance(lines, list) or not all(isinstance(line, str) and "=" in line for line in lines):
        raise UserError(f"{path}: study: expected a list of KEY=VALUES, as [rank=4,8,16], found {lines!r}")
    return lines


def one_line(error: Exception) -> str:
    """An error's text on one line, of bearable length."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:400]
