"""Agreement, KL and losses by the token against their definitions in float64; tokens by what they write."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftrun.evals.divergence import View, divergence, score
from ftrun.evals.kinds import by_kind, kind_of, masks
from tests.families import tiny_tokenizer

TOKENS = torch.randint(0, 50, (23,), generator=torch.Generator().manual_seed(2))


def view(logits: torch.Tensor, log: list[str], name: str) -> View:
    """Two batches of 15 and 8 tokens whose states are the logits themselves."""

    @contextlib.contextmanager
    def within() -> Any:
        log.append(name)
        yield
        log.append(f"/{name}")

    parts = [SimpleNamespace(of=slice(0, 15)), SimpleNamespace(of=slice(15, 23))]
    return View(parts, lambda batch: (logits[batch.of], TOKENS[batch.of]), lambda states: states, within)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_by_definition(chunk: int) -> None:
    generator, log = torch.Generator().manual_seed(0), []
    one, two = (3 * torch.randn(23, 50, generator=generator) for _ in range(2))
    two[:9] = one[:9] + 0.1
    found = divergence(view(one, log, "base"), view(two, log, "tuned"), chunk)
    p, q = one.double().softmax(-1), two.double().softmax(-1)
    assert found["tokens"] == 23
    assert found["agreement"] == float((one.argmax(-1) == two.argmax(-1)).double().mean())
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert found["kl_reverse"] == pytest.approx(float((q * (q / p).log()).sum(-1).mean()), rel=1e-5)
    # the two are one model that is switched: never both at once
    assert all(log[i + 1] == f"/{log[i]}" for i in range(0, len(log), 2))


def test_what_is_impossible_to_the_base_counts_nothing() -> None:
    one, two = torch.zeros(23, 50), torch.zeros(23, 50)
    one[:, 7] = -torch.inf
    found = divergence(view(one, [], "base"), view(two, [], "tuned"))
    assert found["kl"] == pytest.approx(float(torch.tensor(50 / 49).log()), rel=1e-5)
    assert found["kl_reverse"] == float("inf")


def test_losses_of_each_token() -> None:
    logits = torch.randn(23, 50, generator=torch.Generator().manual_seed(1))
    found = score(view(logits, [], "base"), chunk=4)
    expected = -logits.double().log_softmax(-1)[torch.arange(23), TOKENS]
    assert torch.allclose(found.losses.double(), expected, atol=1e-5)
    assert torch.equal(found.likeliest, logits.argmax(-1))
    assert torch.equal(found.tokens, TOKENS)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("7", "numbers"),
        (" 12", "numbers"),
        ("x2", "numbers"),
        ("²", "numbers"),
        ('{"', "structure"),
        ('":', "structure"),
        (" ],\n", "structure"),
        ("</", "structure"),
        ("####", "structure"),
        ("the", "words"),
        (".", "words"),
        ("\n", "words"),
        ("", "words"),
        ("<a>", "words"),
    ],
)
def test_kinds(text: str, kind: str) -> None:
    assert kind_of(text) == kind


def test_means_by_kind() -> None:
    tokenizer = tiny_tokenizer()
    tokens = torch.tensor([*tokenizer('a{"b":12}', add_special_tokens=False).input_ids, 4])
    found = masks(tokens, tokenizer)
    assert {name: mask.nonzero().flatten().tolist() for name, mask in found.items()} == {
        "numbers": [6, 7],
        "structure": [1, 2, 4, 5, 8],
        "words": [0, 3, 9],
    }
    values = torch.arange(10.0)
    assert by_kind(values, found) == {"numbers": 6.5, "structure": 4.0, "words": 4.0}
    assert by_kind(values[:1], masks(tokens[:1], tokenizer)) == {"numbers": None, "structure": None, "words": 0.0}
