"""Sizes as people write them. Light: read before torch is imported."""

from __future__ import annotations

import re

from ftrun.errors import UserError

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}{b}": 1000**n for n, p in enumerate("kmgt", 1) for b in ("", "b")}
_UNITS |= {f"{p}ib": 1024**n for n, p in enumerate("kmgt", 1)}


def parse_size(value: int | str, key: str) -> int:
    """Bytes of 24000000000, "24GB" (1e9 each) or "24GiB" (2^30 each). UserError that names `key` otherwise."""
    if isinstance(value, int):
        size: float = value
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", value.lower().replace(",", ""))
        if match is None or match[2] not in _UNITS:
            raise UserError(
                f"{key}={value}: expected a size as 24GB (1e9 bytes each), 24GiB (2^30) or bytes, found text"
            )
        size = float(match[1]) * _UNITS[match[2]]
    if size < 1:
        raise UserError(f"{key}={value}: expected a size of 1 byte or more, as 24GB, found {size:g} bytes")
    return int(size)
