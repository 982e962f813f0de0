"""A GGUF file's facts and tensors, read in a second: what the `gguf` package's reader takes five for.

The layout is that of GGUF version 3 (ggml's docs/gguf.md): a header, key-value pairs, a table of tensors, then the
tensors' blocks, each aligned. Dequantising stays with the `gguf` package.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ftrun.errors import UserError

# GGUF's type of a value -> its letter in `struct`
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# what nonsense in a header comes to: lengths beyond the file, counts beyond memory, lists of lists without an end
_DAMAGE = (
    struct.error,
    IndexError,
    KeyError,
    UnicodeDecodeError,
    OverflowError,
    MemoryError,
    RecursionError,
    TypeError,
)


class GGUF:
    """An open GGUF file: `facts` by key, and `tensors()`. Raises UserError where the file is damaged or another."""

    def __init__(self, path: Path) -> None:
        self.path, self._at = path, 0
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise UserError(f"{path}: an empty file") from None
        try:
            magic, version, tensors, pairs = self._read("4sIQQ")
            if magic != b"GGUF" or version != 3:
                raise UserError(f"{path}: no GGUF file of version 3")
            self.facts = {self._string(): self._value(*self._read("I")) for _ in range(pairs)}
            self._table = [self._entry() for _ in range(tensors)]
            align = self.facts.get("general.alignment", 32)
            if not isinstance(align, int) or align < 1:
                raise KeyError(align)
        except _DAMAGE:
            raise UserError(f"{path}: damaged: its header ends too early or says nonsense") from None
        self._start = (self._at + align - 1) // align * align

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, float32 array) of each tensor, dequantised, its shape as torch has it (rows first)."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        for name, shape, kind, offset in self._table:
            try:
                values, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
                width = shape[-1] // values * size
                count, start = width * math.prod(shape[:-1]), self._start + offset
                if not 0 < count <= len(self._data) - start:
                    raise ValueError(f"{count} bytes at {start}")
                raw = np.frombuffer(self._data, np.uint8, count, start).reshape(*shape[:-1], width)
            except (ValueError, KeyError, IndexError) as error:
                raise UserError(f"{self.path}: damaged: the tensor {name!r}: {error}") from None
            plain = raw.view(np.float32).copy() if kind == GGMLQuantizationType.F32 else raw
            yield name, dequantize(plain, GGMLQuantizationType(kind))

    def _read(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return found

    def _string(self) -> str:
        (length,) = self._read("Q")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._read(_SCALARS[kind])[0]
        inner, count = self._read("IQ")
        if inner in _SCALARS:
            return list(self._read(f"{count}{_SCALARS[inner]}"))
        return [self._value(inner) for _ in range(count)]

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape with rows first, type, offset) of one tensor."""
        name = self._string()
        (dimensions,) = self._read("I")
        shape = self._read(f"{dimensions}Q")[::-1]
        kind, offset = self._read("IQ")
        return name, shape, kind, offset
