"""Shell completion: Hydra's scripts ask `ftrun -sc query=SHELL`; the answers are verbs, groups, choices and keys."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftrun.errors import UserError, unknown

_SHELLS = ("bash", "zsh", "fish")
_FLAGS = ("--help", "--version", "--multirun", "--cfg", "--info", "--resolve", "--package", "--config-dir")


def answer(request: str, verbs: Sequence[str]) -> int:
    """`install=bash`, `uninstall=bash`: print Hydra's script. `query=bash`: print what could come next."""
    command, _, shell = request.partition("=")
    if command not in ("install", "uninstall", "query"):
        raise UserError(unknown("-sc:", command, ("install", "uninstall", "query")) + ". As in: -sc install=bash")
    if shell not in _SHELLS:
        raise UserError(unknown(f"-sc {command}:", shell, _SHELLS))
    if command == "query":
        line = os.environ.get("COMP_LINE", "")
        point = os.environ.get("COMP_POINT", "")
        found = candidates(line[: int(point)] if point.isdigit() else line, verbs)
        print(("\n" if shell == "fish" else " ").join(found))
        return 0
    _script(command, shell)
    return 0


def _script(command: str, shell: str) -> None:
    from hydra._internal.core_plugins.bash_completion import BashCompletion
    from hydra._internal.core_plugins.fish_completion import FishCompletion
    from hydra._internal.core_plugins.zsh_completion import ZshCompletion

    # the script completes the command by its name, however it was started
    sys.argv = ["ftrun", *sys.argv[1:]]
    plugins: dict[str, Any] = {"bash": BashCompletion, "zsh": ZshCompletion, "fish": FishCompletion}
    getattr(plugins[shell](None), command)()


def candidates(line: str, verbs: Sequence[str]) -> list[str]:
    """The whole words that can stand where the last word of `line` does."""
    words = line.split()[1:]
    word = words.pop() if words and not line.endswith((" ", "\t")) else ""
    given = [w for w in words if "=" in w]
    if word.startswith("-"):
        return [flag for flag in _FLAGS if flag.startswith(word)]
    key, equals, value = word.partition("=")
    if equals:
        *before, last = value.split(",") if "[" not in value else [value]
        start = f"{key}=" + "".join(f"{b}," for b in before)
        return [start + found for found in _values(key, last, given)]
    first = [v for v in verbs if v.startswith(word)] if not words else []
    return first + sorted(k for k in _keys(word, given) if k.startswith(word))


def _values(key: str, start: str, given: Sequence[str]) -> list[str]:
    from ftrun.groups import choices_of
    from ftrun.job import GROUPS
    from ftrun.shell import is_text

    if key in GROUPS:
        return [name for name in choices_of(key) if name.startswith(start)]
    if is_text(key, start):
        return _files(start)
    return [text for text in _admitted(key, given) if text.startswith(start)]


def _files(start: str) -> list[str]:
    folder, slash, name = start.rpartition("/")
    try:
        entries = sorted(Path(folder + slash or ".").expanduser().iterdir())
    except OSError:
        return []
    return [f"{folder}{slash}{p.name}{'/' * p.is_dir()}" for p in entries if p.name.startswith(name)]


def _keys(word: str, given: Sequence[str]) -> list[str]:
    """Groups and keys, the options of a group once its name and a dot are typed."""
    from ftrun.groups import leaves
    from ftrun.job import GROUPS

    tree = _tree(given)
    paths = [path for path, _ in leaves(tree, depth=2) if not path.endswith(".kind")]
    roots = [f"{p}=" for p in paths if "." not in p and p not in GROUPS] + [f"{g}=" for g in GROUPS] + ["job="]
    if "." in word:
        return [f"{p}=" for p in paths if "." in p]
    return roots


def _tree(given: Sequence[str]) -> Mapping[str, Any]:
    from omegaconf import OmegaConf

    from ftrun.compose import composed
    from ftrun.job import GROUPS

    groups = [w for w in given if w.partition("=")[0] in GROUPS]
    try:
        return OmegaConf.to_container(composed(groups).tree, resolve=False)  # type: ignore[return-value]
    except UserError:
        # half a line is often no job yet
        return {}


def _admitted(key: str, given: Sequence[str]) -> list[str]:
    """The values that a key takes, where they can be listed: its choices, true and false, or its default."""
    from ftrun.help import described

    for one in described([w for w in given if not w.startswith(key + "=")]):
        if key in (one.key, one.path):
            return [*one.choices] or [one.default]
    return []
