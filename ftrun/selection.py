"""The grammar of `layers` and `targets`: what a user may type, checked before any model is at hand.

layers    all | 3 | 0-7 | first:8 | last:8 | every:2 (layers 0, 2, 4, …) | a list of these: [0,3,5-7]
targets   all | attention | mlp | qv | experts | embeddings | head | a module's name or the end of it (q_proj) |
          re:PATTERN (matches the whole dotted name, as in PEFT) | a list of these: [q_proj,v_proj]
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ftrun.errors import UserError, nearest

Layers = str | int | Sequence[str | int]
Targets = str | Sequence[str]

# taken by what they are, not by their name
KEYWORDS = ("all", "attention", "mlp", "qv", "experts", "embeddings", "head")

_FORMS = "all, 3, 0-7, first:8, last:8, every:2, or a list [0,3,5-7]"


def parse_layers(spec: Layers, depth: int | None = None) -> tuple[int, ...]:
    """The layers that `spec` names in a model of `depth` layers, in order, each once.

    Without a depth only the grammar is checked, and the answer is empty. Raises UserError that names the key.
    """
    parts = [spec] if isinstance(spec, str | int) else list(spec)
    if not parts:
        raise UserError(f"layers=[]: no layer is named. Expected {_FORMS}")
    found: set[int] = set()
    for part in parts:
        found |= set(_part(part, depth))
    return tuple(sorted(found))


def check_targets(spec: Targets) -> tuple[str, ...]:
    """The elements of `spec`, each well formed; UserError otherwise. Whether they match is the model's to say."""
    if isinstance(spec, str) and "," in spec and not spec.startswith("re:"):
        raise UserError(f"targets={spec}: a list is written targets=[{spec}]")
    parts = (spec,) if isinstance(spec, str) else tuple(spec)
    if not parts:
        raise UserError(f"targets=[]: no module is named. Expected {_words()}")
    for part in parts:
        _check_target(part)
    return parts


def _words() -> str:
    return f"{', '.join(KEYWORDS)}, a module's name such as q_proj, re:PATTERN, or a list of these"


def _check_target(part: str) -> None:
    if not isinstance(part, str):
        raise UserError(f"targets: {part!r} is no name of a module. Expected {_words()}")
    if part.startswith("re:"):
        try:
            re.compile(part[3:])
        except re.error as error:
            raise UserError(f"targets={part}: not a regular expression: {error}") from None
        if not part[3:]:
            raise UserError("targets=re:: the pattern is empty. Example: targets='re:.*\\.[qv]_proj'")
    elif not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", part):
        hint = f" For a pattern write targets='re:{part}'." if re.search(r"[*\\|()\[\]^$?+]", part) else ""
        raise UserError(f"targets={part}: not a module's name.{hint} Expected {_words()}")


def _part(part: str | int, depth: int | None) -> range:
    """The layers of one element; an empty range where the depth is unknown."""
    shown = f"layers={part}"
    if isinstance(part, bool) or not isinstance(part, str | int):
        raise UserError(f"{shown}: expected {_FORMS}")
    text = str(part).strip()
    if text == "all":
        return range(depth or 0)
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        return _range(shown, int(match[1]), int(match[2] or match[1]), depth)
    if match := re.fullmatch(r"(first|last|every):(\d+)", text):
        return _counted(shown, match[1], int(match[2]), depth)
    raise UserError(f"{shown}: {_guess(text)}expected {_FORMS}")


def _guess(text: str) -> str:
    if re.match(r"-\d", text):
        return f"layers are counted from 0; for the last ones write layers=last:{text.lstrip('-').split('-')[0]}. Else "
    if "," in text:
        return f"a list is written layers=[{text}]; "
    close = nearest(text.split(":")[0], ("all", "first", "last", "every"))
    return f"did you mean {close!r}? " if close else ""


def _range(shown: str, low: int, high: int, depth: int | None) -> range:
    if low > high:
        raise UserError(f"{shown}: the range runs backwards. Did you mean layers={high}-{low}?")
    if depth is not None and high >= depth:
        last = f"; for the last {high - low + 1} write layers=last:{high - low + 1}" if high - low < depth else ""
        raise UserError(f"{shown}: the model has {depth} layers, 0 to {depth - 1}{last}")
    return range(low, high + 1) if depth is not None else range(0)


def _counted(shown: str, word: str, count: int, depth: int | None) -> range:
    if count < 1 or (depth is not None and count > depth):
        most = "" if depth is None else f" to {depth}, the layers of this model"
        raise UserError(f"{shown}: expected {word}:N with N from 1{most}")
    if depth is None:
        return range(0)
    return {"first": range(count), "last": range(depth - count, depth), "every": range(0, depth, count)}[word]
