"""A base's weights from job to job: taken as they are, and proven untouched."""

from __future__ import annotations

import pytest
import torch

from ftrun.kernels.checksum import checksum
from ftrun.models.warm import Shelf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5), (1,), (64, 33), ()])
def test_any_one_element_changes_the_checksum(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 2, shape, generator=generator).to(dtype)
    before = checksum(whole)
    for place in range(whole.numel()):
        changed = whole.clone()
        flat = changed.view(-1)
        flat[place] = 1 - flat[place] if dtype != torch.bool else not flat[place]
        assert checksum(changed) != before, place


def test_the_checksum_is_of_values_in_order() -> None:
    rows = torch.arange(12.0).view(3, 4)
    assert checksum(rows) == checksum(rows.clone())
    assert checksum(rows.T) == checksum(rows.T.contiguous())
    assert checksum(rows.flip(0)) != checksum(rows)
    assert checksum(rows[1:]) == checksum(rows[1:].clone())  # not at the start of its storage
    assert checksum(rows.view(-1)[1:]) == checksum(rows.view(-1)[1:].clone())  # nor at a word of eight bytes


def test_a_shelf_gives_what_was_put_there_and_tells_what_was_changed() -> None:
    shelf, weights = Shelf(), {"a.weight": torch.ones(4, 4), "b.weight": torch.zeros(3, dtype=torch.uint8)}
    shelf.put("one", weights)
    found = shelf.of("one")
    assert found is not None
    assert found["a.weight"].data_ptr() == weights["a.weight"].data_ptr()
    assert shelf.bytes == 4 * 16 + 3
    assert shelf.changed() == []
    weights["b.weight"][1] = 7
    assert shelf.changed() == ["b.weight"]
    assert shelf.of("another") is None
    assert shelf.bytes == 0  # two bases are never held
