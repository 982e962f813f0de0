"""The jobs of the matrix "planned against measured": a covering sample of methods, storages, optimisers and shapes.

Each job is one value of every factor. The sample is deterministic: first every valid pair of values at least once, by
the greedy rule of AETG (Cohen et al. 1997), then as many triples as the remaining jobs can hold.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import combinations

COUNT = 96  # jobs of the whole matrix
_TRIES = 60  # random candidates for each next job

FACTORS: dict[str, tuple[str, ...]] = {
    "model": ("smollm2", "llama", "gpt2", "gpt_neox", "gemma3", "qwen3_moe", "phi3"),
    "method": ("full", "lora", "lora_dropout", "dora", "houlsby", "prompt"),
    "quant": ("none", "nf4", "int8"),
    "checkpointing": ("none", "all", "some"),
    "optim": ("adamw", "adamw_8bit", "sgd"),
    "shape": ("one", "long", "ragged", "accumulated", "short"),
    "kernels": ("fast", "reference"),
    "dtype": ("bfloat16", "float32"),
}


@dataclass(frozen=True)
class Case:
    """One job of the matrix, a value for each factor."""

    model: str
    method: str
    quant: str
    checkpointing: str
    optim: str
    shape: str
    kernels: str
    dtype: str

    def __str__(self) -> str:
        return " ".join(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Shape:
    """Rows of a step, rows at once, and the tokens of each row in turn."""

    batch: int
    micro_batch: int
    lengths: tuple[int, ...]


SHAPES = {
    "one": Shape(2, 2, (512,)),
    "long": Shape(1, 1, (1024,)),
    "ragged": Shape(16, 16, (200, 61, 173, 96, 32, 150, 121, 180)),
    "accumulated": Shape(8, 2, (380, 301, 77, 256, 350)),
    "short": Shape(16, 16, (72,)),
}


def valid(case: Case) -> bool:
    """Whether such a job exists: weights that are stored quantised cannot be trained themselves."""
    return not (case.method == "full" and case.quant != "none")


def matrix(count: int = COUNT, seed: int = 0) -> list[Case]:
    """The whole matrix, the same at each call: every valid pair of values, then many triples."""
    rng = random.Random(seed)
    left = {strength: set(_valid_groups(strength)) for strength in (2, 3)}
    chosen: list[Case] = []
    while len(chosen) < count:
        goal = left[2] or left[3]
        best = max(
            _candidates(rng, goal, chosen),
            key=lambda c: len(left[2] & _groups(c, 2)) * 1000 + len(left[3] & _groups(c, 3)),
        )
        chosen.append(best)
        for strength, open_ in left.items():
            open_ -= _groups(best, strength)
    return chosen


def spread(cases: list[Case], count: int) -> list[Case]:
    """`count` of the cases that hold as many pairs of values as possible, in the order of the matrix."""
    left, chosen = set(_valid_groups(2)), list[Case]()
    while len(chosen) < min(count, len(cases)):
        best = max((c for c in cases if c not in chosen), key=lambda c: len(left & _groups(c, 2)))
        chosen.append(best)
        left -= _groups(best, 2)
    return [c for c in cases if c in chosen]


def _gain(case: Case, left: dict[int, set[Group]]) -> tuple[int, ...]:
    """The open pairs and triples that the case would hold."""
    return tuple(len(left[strength] & _groups(case, strength)) for strength in (2, 3))


Group = tuple[tuple[str, str], ...]


def _groups(case: Case, strength: int) -> set[Group]:
    return set(combinations([(name, getattr(case, name)) for name in FACTORS], strength))


def _valid_groups(strength: int) -> Iterator[Group]:
    """Every group of values that some valid case holds."""
    for names in combinations(FACTORS, strength):
        yield from (g for g in _products(names) if _completable(g))


def _products(names: tuple[str, ...]) -> Iterable[Group]:
    found: list[Group] = [()]
    for name in names:
        found = [(*group, (name, value)) for group in found for value in FACTORS[name]]
    return found


def _completable(group: Group) -> bool:
    return valid(Case(**{**dict.fromkeys(FACTORS, ""), "quant": "none", **dict(group)}))


def _candidates(rng: random.Random, goal: set[Group], chosen: list[Case]) -> Iterator[Case]:
    """Random valid cases, each built around a group that is still to be held."""
    open_ = sorted(goal)
    found = 0
    while found < _TRIES:
        given = dict(rng.choice(open_)) if open_ else {}
        case = Case(**{name: given.get(name) or rng.choice(values) for name, values in FACTORS.items()})
        if valid(case) and case not in chosen:
            found += 1
            yield case
