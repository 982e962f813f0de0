"""The flags that Hydra's users know: --cfg, --info, --resolve, --package, -m, --config-dir, shell completion."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ftrun.errors import UserError, unknown

_CFG = ("job", "hydra", "all")
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
# flag -> (its long form, what it takes); our help and the messages list the long ones
_VALUED = {
    "--cfg": ("--cfg", _CFG),
    "-c": ("--cfg", _CFG),
    "--info": ("--info", _INFO),
    "-i": ("--info", _INFO),
    "--package": ("--package", ()),
    "-p": ("--package", ()),
    "--config-dir": ("--config-dir", ()),
    "-cd": ("--config-dir", ()),
    "--shell-completion": ("--shell-completion", ()),
    "-sc": ("--shell-completion", ()),
}
_ALONE = {
    "--help": "--help",
    "-h": "--help",
    "--multirun": "--multirun",
    "-m": "--multirun",
    "--resolve": "--resolve",
    "--version": "--version",
}


@dataclass
class Flags:
    """A command line, sorted: its flags by their long names, and the rest in order."""

    words: list[str] = field(default_factory=list)  # the verb, if one is given, and the overrides
    alone: set[str] = field(default_factory=set)
    valued: dict[str, str] = field(default_factory=dict)
    config_dirs: list[Path] = field(default_factory=list)


def split(arguments: Sequence[str]) -> Flags:
    """Sort a command line. Raises UserError on an unknown flag, or a value that a flag does not take."""
    flags, rest = Flags(), list(arguments)
    while rest:
        one = rest.pop(0)
        name, equals, value = one.partition("=") if one.startswith("--") else (one, "", "")
        if not one.startswith("-"):
            flags.words.append(one)
        elif one in _ALONE:
            flags.alone.add(_ALONE[one])
        elif name in _VALUED:
            flag, choices = _VALUED[name]
            if not equals:
                value = _next(flag, rest)
            if choices and value not in choices:
                raise UserError(unknown(f"{flag}:", value, choices))
            if flag == "--config-dir":
                flags.config_dirs.append(_folder(value))
            flags.valued[flag] = value
        else:
            raise UserError(_unknown_flag(one, rest))
    if "--cfg" not in flags.valued and ("--resolve" in flags.alone or "--package" in flags.valued):
        raise UserError("--resolve and --package say how --cfg prints: add --cfg job")
    return flags


def _next(flag: str, rest: list[str]) -> str:
    if rest and (flag != "--info" or rest[0] in _INFO):
        return rest.pop(0)
    if flag == "--info":
        return "all"
    raise UserError(f"{flag}: its value is missing; see ftrun --help")


def _unknown_flag(one: str, rest: Sequence[str]) -> str:
    name, _, value = one.lstrip("-").partition("=")
    known = sorted({*_ALONE.values(), *(flag for flag, _ in _VALUED.values())})
    if difflib.get_close_matches(one.partition("=")[0], known, cutoff=0.75):
        return unknown("the flag", one, known)
    value = value or (rest[0] if rest and "=" not in rest[0] else "VALUE")
    return f"the flag {one!r} is unknown. Keys are set without dashes: {name.replace('-', '_')}={value}"


def _folder(text: str) -> Path:
    path = Path(text).expanduser()
    if not text or not path.is_dir():
        raise UserError(f"--config-dir {text}: no such folder")
    return path.resolve()


def show_job(overrides: Sequence[str], config_dirs: Sequence[Path], package: str | None, resolve: bool) -> int:
    """--cfg job: the composed configuration as YAML; one part of it where `package` names one."""
    from omegaconf import OmegaConf

    from ftrun.compose import composed

    made = composed(overrides, config_dirs)
    # a value still missing (???) is what one looks for here; any other mistake is one
    if not OmegaConf.missing_keys(made.tree):
        made.job()
    part = OmegaConf.select(made.tree, package) if package else made.tree
    if not OmegaConf.is_config(part):
        raise UserError(unknown("--package:", str(package), [k for k in made.tree if OmegaConf.is_dict(made.tree[k])]))
    header = f"# @package {package}\n" if package else ""
    print(header + OmegaConf.to_yaml(part, resolve=resolve), end="")
    return 0


def hand_over(flags: Flags, overrides: Sequence[str]) -> int:
    """Let Hydra answer --info and --cfg hydra|all itself, on overrides that we have found valid."""
    from hydra import main as hydra_main

    from ftrun.compose import composed, conf_dir
    from ftrun.shell import as_hydra, parse, quote

    given = parse(overrides, multirun=False)
    if any(o.key == "job" for o in given):
        raise UserError("job=FILE: Hydra's own views do not know it; --cfg job shows the composed job")
    composed(overrides, flags.config_dirs).job()
    searched = ",".join(quote(f"file://{d}") for d in flags.config_dirs)
    asked = [
        text for name in ("--cfg", "--info", "--package") if name in flags.valued for text in (name, flags.valued[name])
    ]
    resolve = ["--resolve"] if "--resolve" in flags.alone else []
    sys.argv = ["ftrun", *asked, *resolve, f"hydra.searchpath=[{searched}]", *map(as_hydra, given)]

    @hydra_main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    def nothing_to_run(cfg: object) -> None:
        raise UserError("Hydra's flags print; they run no job")

    nothing_to_run()
    return 0
