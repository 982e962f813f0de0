"""rank_pattern and alpha_pattern: other values for some of the selected weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from ftrun.errors import UserError, nearest
from ftrun.selection import parse_layers
from ftrun.values import Site

V = TypeVar("V", int, float)
_LAYERS = re.compile(r"\d+(-\d+)?|(first|last|every):\d+")


def resolve(pattern: Mapping[str, V], key: str, sites: Sequence[Site], depth: int, default: V) -> dict[str, V]:
    """Each site's value by name: that of the first entry that fits, else `default`.

    An entry is a range of layers, as in `layers`, or a regular expression that matches the whole module name or
    the end of it after a dot, as PEFT has it. UserError, naming `key`, where an entry fits none of the sites.
    """
    chosen = {site.name: default for site in sites}
    open_names = set(chosen)
    for entry, value in pattern.items():
        names = {site.name for site in sites if _fits(entry, key, site, depth)}
        if not names:
            close = nearest(entry, {site.name.rpartition(".")[2] for site in sites})
            hint = f" Did you mean {close!r}?" if close else ""
            raise UserError(f"method.{key}: {entry!r} fits none of the selected weights.{hint}")
        for name in names & open_names:
            chosen[name] = value
        open_names -= names
    return chosen


def _fits(entry: str, key: str, site: Site, depth: int) -> bool:
    if _LAYERS.fullmatch(entry):
        return site.layer in parse_layers(entry, depth)
    try:
        return re.match(rf"(.*\.)?({entry})$", site.name) is not None
    except re.error as error:
        raise UserError(f"method.{key}: {entry!r} is no regular expression: {error}") from error
