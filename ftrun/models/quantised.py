"""The quantised base on disk: `CACHE/quantised/KEY/`, model.safetensors and sums.json, read again as it is.

KEY follows from the source's hash, the scheme, the dtype and the vocabulary. The folder is written aside and renamed
when it is whole. Every tensor has a CRC-32, checked when it is read: a damaged folder is built again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from ftrun.beside import beside
from ftrun.errors import UserError
from ftrun.models.tensors import Layout, TensorFile, Writer, raw

FORMAT = 1  # of the stored tensors: a change of layout is a change of this number
_WEIGHTS, _SUMS = "model.safetensors", "sums.json"


class Damaged(Exception):
    """The cached base cannot be used; the message says why."""


class Cached:
    """One base under one scheme. `facts` are all that its bytes depend on."""

    def __init__(self, cache: Path, facts: dict[str, str]) -> None:
        text = json.dumps({"format": FORMAT, **facts}, sort_keys=True)
        self.facts = facts
        self.folder = cache / "quantised" / hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def there(self) -> bool:
        return self.folder.is_dir()

    def read(self, layout: Layout, take: Callable[[str, torch.Tensor], None]) -> None:
        """Hands each tensor to `take`. Raises Damaged unless the file holds `layout`, byte for byte as written."""
        try:
            sums = json.loads((self.folder / _SUMS).read_text())["crc32"]
            file = TensorFile(self.folder / _WEIGHTS)
            if file.layout() != dict(layout) or sums.keys() != layout.keys():
                raise Damaged("its tensors are not those of this model")
            for name in file.header:
                tensor = file.read(name)
                if zlib.crc32(raw(tensor)) != sums[name]:
                    raise Damaged(f"the bytes of {name} changed")
                take(name, tensor)
        # UserError is a ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(str(error)) from error

    def discard(self) -> None:
        """Takes the folder away."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Keeping:
    """Writes a base into the cache while it is being filled: `with Keeping(cached, layout) as keep: keep.add(…)`.

    A full or read-only disk costs the cache, never the job: `failed` then says why, and nothing is left behind.
    """

    def __init__(self, cached: Cached, layout: Layout) -> None:
        self.cached, self.layout, self.failed = cached, layout, ""
        self._aside = beside(cached.folder)
        self._writer: Writer | None = None

    def __enter__(self) -> Keeping:
        self._attempt(self._open)
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """One tensor; one that the layout does not have, a tied one, is passed over."""
        if self._writer is not None and name in self.layout:
            self._attempt(functools.partial(self._writer.add, name, tensor))

    @property
    def left(self) -> set[str]:
        """The names of the layout that are not yet written."""
        return self._writer.left if self._writer and not self.failed else set()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._attempt(self._finish)
        shutil.rmtree(self._aside, ignore_errors=True)

    def _open(self) -> None:
        parent = self._aside.parent
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir(mode=0o700)
        self._writer = Writer(self._aside / _WEIGHTS, self.layout)

    def _finish(self) -> None:
        assert self._writer is not None
        if self._writer.left:
            raise OSError(f"{len(self._writer.left)} tensors were not filled")
        self._writer.close()
        note = {"format": FORMAT, **self.cached.facts, "crc32": self._writer.sums}
        (self._aside / _SUMS).write_text(json.dumps(note))
        self.cached.discard()
        self._aside.rename(self.cached.folder)

    def _attempt(self, act: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            act()
        except UserError:
            raise
        except OSError as error:
            self.failed = str(error)
