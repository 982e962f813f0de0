"""A base's weights kept from one job of a process to the next, and proof that no job has touched them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from ftrun.kernels.checksum import checksum


class Shelf:
    """The frozen weights of the last base, by their names in the model, with the checksum of each."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._sums: dict[str, int] = {}

    def of(self, key: Hashable) -> Mapping[str, torch.Tensor] | None:
        """The weights that were put here under this key; None, and nothing kept any more, where others were."""
        if self._tensors and self._key == key:
            return self._tensors
        self.clear()
        return None

    def put(self, key: Hashable, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep these. Nothing is copied: they are the model's own."""
        self._key = key
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._sums = {name: checksum(tensor) for name, tensor in self._tensors.items()}

    def changed(self) -> list[str]:
        """The names of the tensors that are no longer what was put here."""
        return [name for name, tensor in self._tensors.items() if checksum(tensor) != self._sums[name]]

    def clear(self) -> None:
        """Keep nothing."""
        self._key, self._tensors, self._sums = None, {}, {}

    @property
    def bytes(self) -> int:
        """What is kept."""
        return sum(t.numel() * t.element_size() for t in self._tensors.values())
