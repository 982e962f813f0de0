"""Tensors of safetensors files, one at a time: read into memory of their own, or written at their place.

Reading never maps a file: a mapped file counts as the process's memory, and a change of it on disk would change
the model. Writing needs every shape before the first byte, and then takes tensors in any order.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftrun.errors import UserError
from ftrun.kernels import pages
from ftrun.models.sources.folder import read_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name -> (shape, dtype)


class TensorFile:
    """One safetensors file. Raises UserError (from `read_header`) where it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        with path.open("rb") as file:
            self._start = 8 + struct.unpack("<Q", file.read(8))[0]

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Each tensor's shape and dtype."""
        return {name: (tuple(v["shape"]), self._dtype(name)) for name, v in self.header.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in memory of its own."""
        begin, end = self.header[name]["data_offsets"]
        shape, dtype = tuple(self.header[name]["shape"]), self._dtype(name)
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{self.path}: {name} has {end - begin} bytes, its shape {list(shape)} says otherwise")
        data = pages.empty((end - begin,), torch.uint8)
        view = data.numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + begin)
            done = 0
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise UserError(f"{self.path}: cut short while {name} was read")
                done += got
        return data.view(dtype).view(shape)

    def _dtype(self, name: str) -> torch.dtype:
        kind = self.header[name]["dtype"]
        if kind not in DTYPES:
            raise UserError(f"{self.path}: {name} is stored as {kind}, expected one of {', '.join(DTYPES)}")
        return DTYPES[kind]


class Writer:
    """A safetensors file that is filled tensor by tensor. `sums` holds the CRC-32 of each tensor written."""

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        self.sums: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._offsets, at = {}, 0
        # safetensors wants each tensor at a multiple of its item's size: largest items first
        for name in sorted(layout, key=lambda n: (-layout[n][1].itemsize, n)):
            shape, dtype = layout[name]
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
            self._offsets[name], at = (at, size), at + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._start + at)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor at its place."""
        data = raw(tensor)
        begin, size = self._offsets[name]
        assert data.nbytes == size, f"{name}: {data.nbytes} bytes, expected {size}"
        self._file.seek(self._start + begin)
        self._file.write(data)
        self.sums[name] = zlib.crc32(data)

    @property
    def left(self) -> set[str]:
        """The names not yet written."""
        return self._offsets.keys() - self.sums.keys()

    def close(self) -> None:
        """Everything to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def raw(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
