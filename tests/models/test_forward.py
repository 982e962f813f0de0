"""Packed rows and chunked logits give the losses and gradients of padded rows and full logits, in every family."""

from __future__ import annotations

import pytest
import torch

from ftrun.models.forward import PACKED, TokenLoss, register_attention
from ftrun.values import IGNORE, Batch
from tests.families import FAMILIES, tiny_model

LENGTHS = (7, 23, 1, 31)


def rows(vocab: int = 272) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in LENGTHS:
        ids = torch.randint(5, vocab, (length,), generator=generator)
        targets = torch.cat([ids[1:], torch.tensor([IGNORE])])
        targets[: length // 3] = IGNORE
        made.append((ids, targets))
    return made


def packed() -> Batch:
    ids, targets = (torch.cat(parts)[None] for parts in zip(*rows(), strict=True))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return batch(ids, positions, targets, True)


def padded() -> Batch:
    width = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), width, dtype=torch.long)
    positions, targets = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for i, (row, target) in enumerate(rows()):
        ids[i, : len(row)], targets[i, : len(row)] = row, target
        positions[i, : len(row)] = torch.arange(len(row))
    return batch(ids, positions, targets, False)


def batch(ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, is_packed: bool) -> Batch:
    supervised = int((targets != IGNORE).sum())
    return Batch(ids, positions, targets, LENGTHS, is_packed, sum(LENGTHS), supervised, tuple(range(len(LENGTHS))))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded(family: str) -> None:
    register_attention()
    results = {}
    for kernels, implementation, rows_of in (("reference", "eager", padded), ("fast", PACKED, packed)):
        model = tiny_model(family)
        model.requires_grad_(True)
        model.set_attn_implementation(implementation)
        loss = TokenLoss(model, kernels)(rows_of())
        loss.backward()
        results[kernels] = loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    (plain, plain_grads), (fast, fast_grads) = results["reference"], results["fast"]
    assert abs(float(plain - fast)) < 1e-5 * float(plain)
    assert plain_grads.keys() == fast_grads.keys()
    scale = max(float(g.norm()) for g in plain_grads.values())
    for name, gradient in plain_grads.items():
        assert float((gradient - fast_grads[name]).norm()) < 1e-5 * max(float(gradient.norm()), 1e-3 * scale), name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_row_does_not_see_its_neighbours(family: str) -> None:
    register_attention()
    model = tiny_model(family)
    model.set_attn_implementation(PACKED)
    one = packed()
    changed = one.input_ids.clone()
    changed[0, : LENGTHS[0]] = 9  # another first row
    other = Batch(**{**one.__dict__, "input_ids": changed})
    with torch.no_grad():
        before, after = (TokenLoss(model, "fast").logits(b) for b in (one, other))
    assert torch.equal(before[0, LENGTHS[0] :], after[0, LENGTHS[0] :])
    assert not torch.equal(before[0, : LENGTHS[0]], after[0, : LENGTHS[0]])
