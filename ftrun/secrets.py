"""What opens a door, and what stands in its place wherever something is written or said."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
# names of options and of the environment's variables
KEYS = re.compile(r"(^|[_.-])(token|api_?key|access_?key|secret|password|passwd|credentials?)$", re.IGNORECASE)
_VALUES = re.compile(
    r"(?<=://)[^/@\s]+(?=@)|\bhf_[A-Za-z0-9]{20,}\b|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}"
)
_SHORTEST = 8  # characters: a shorter value of the environment is likely a word as well


def hide(text: str) -> str:
    """The text without tokens, without credentials in addresses, and without what the environment calls a secret."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and KEYS.search(name):
            text = text.replace(value, HIDDEN)
    return _VALUES.sub(HIDDEN, text)


def hidden(value: Any) -> Any:
    """Plain values with their secrets hidden: texts as `hide` has them, and whatever lies under a secret's name."""
    if isinstance(value, Mapping):
        return {k: HIDDEN if v and KEYS.search(str(k)) else hidden(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(hidden(v) for v in value)
    return hide(value) if isinstance(value, str) else value
