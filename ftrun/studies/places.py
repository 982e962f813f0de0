"""Sets of layers, modules or kinds of module under a budget: the best by a probe's scores, and others to compare with.

Scores are falls of the loss to first order, which add up (ftrun/tasks/probe.py): under a budget of equal costs the best
set is that of the highest scores; else this is a knapsack, filled by score per cost and then with what still fits.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftrun.studies.study import as_value

# what may be chosen -> the option that names it, and what a budget of it may count
CHOICES = {
    "layers": ("layers", ("layers", "modules", "parameters", "bytes")),
    "modules": ("targets", ("modules", "parameters", "bytes")),
    "kinds": ("targets", ("kinds", "modules", "parameters", "bytes")),
}
_OUTSIDE = ("embeddings", "head")  # named by what they are: no pattern takes them


@dataclass(frozen=True)
class Item:
    """What is taken or left as a whole: a layer, a module or a kind of module, with its places as the probe gave them.

    cost: in the budget's unit. at: where it lies in the model, for a set that is evenly spaced.
    """

    name: str
    at: int
    cost: float
    places: tuple[Mapping[str, Any], ...]

    @property
    def score(self) -> float:
        """The fall of the loss that a step on all of it buys."""
        return float(sum(place["score"] for place in self.places))

    @property
    def parameters(self) -> int:
        """What trains in it."""
        return sum(place["parameters"] for place in self.places)


def items_of(places: Iterable[Mapping[str, Any]], choose: str, unit: str) -> list[Item]:
    """What can be chosen among, in the order of the model: what the option that chooses cannot name is left out."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for place in places:
        if (place["layer"] is None) if choose == "layers" else not place["can"]:
            continue
        name = {"layers": str(place["layer"]), "modules": place["name"], "kinds": place["kind"]}[choose]
        found.setdefault(name, []).append(place)
    made = []
    for number, (name, mine) in enumerate(found.items()):
        at = mine[0]["layer"] if choose == "modules" and mine[0]["layer"] is not None else number
        made.append(Item(name, at, _cost(mine, choose, unit), tuple(mine)))
    return made


def _cost(places: Sequence[Mapping[str, Any]], choose: str, unit: str) -> float:
    if unit == choose:
        return 1.0
    if unit == "modules":
        return float(sum(place["can"] for place in places) or len(places))
    return float(sum(place[unit] for place in places))


def best(items: Sequence[Item], budget: float) -> list[Item]:
    """By score per cost, as long as it fits, then what still fits; in the order of the model."""
    ranked = sorted(items, key=lambda item: -item.score / item.cost)
    return _in_order(items, _filled(ranked, budget))


def spread(items: Sequence[Item], budget: float) -> list[Item]:
    """The largest evenly spaced set within the budget: over the layers, and in turn over what lies in each of them."""
    for count in range(len(items), 0, -1):
        found = _spaced(items, count)
        if sum(item.cost for item in found) <= budget:
            return _in_order(items, found)
    return []


def drawn(items: Sequence[Item], budget: float, seed: str) -> list[Item]:
    """A set drawn at random, each as likely as another, until nothing more fits."""
    return _in_order(items, _filled(random.Random(seed).sample(list(items), len(items)), budget))


def _filled(ranked: Iterable[Item], budget: float) -> list[Item]:
    found, left = [], budget
    for item in ranked:
        if item.cost <= left:
            found.append(item)
            left -= item.cost
    return found


def _spaced(items: Sequence[Item], count: int) -> list[Item]:
    """Places i + ½ of `count` equal parts; where several items lie at one place, another of them each time."""
    at: dict[int, list[Item]] = {}
    for item in items:
        at.setdefault(item.at, []).append(item)
    groups, found = list(at.values()), []
    for number in range(count):
        start = int((number + 0.5) * len(groups) / count)
        group = groups[min((n for n, g in enumerate(groups) if g), key=lambda n: abs(n - start))]
        found.append(group.pop(number % len(group)))
    return found


def _in_order(items: Sequence[Item], chosen: Sequence[Item]) -> list[Item]:
    names = {item.name for item in chosen}
    return [item for item in items if item.name in names]


def override(chosen: Sequence[Item], choose: str) -> str:
    """The value of the option that takes exactly these: [3,7], [q_proj,down_proj], or a pattern of full names."""
    if choose == "layers":
        return as_value([int(item.name) for item in chosen])
    if choose == "kinds":
        return as_value([item.name for item in chosen])
    named = [place["kind"] for item in chosen for place in item.places if place["kind"] in _OUTSIDE]
    inside = [place for item in chosen for place in item.places if place["kind"] not in _OUTSIDE]
    pattern = f"re:{'|'.join(_alternatives(inside))}"
    if not named:
        return pattern
    return as_value([*([pattern] if inside else []), *named])


def asked(value: Any) -> str:
    """A job's own value of that option."""
    return value if isinstance(value, str) and value.startswith("re:") else as_value(value)


def _alternatives(places: Sequence[Mapping[str, Any]]) -> list[str]:
    """Patterns that match the whole names of these modules and no others: one for each name within a layer."""
    layers: dict[tuple[str, str], list[str]] = {}
    for place in places:
        tail = place["path"] if place["layer"] is None else f".{place['layer']}.{place['path']}"
        stem = place["name"].removesuffix(tail)
        layers.setdefault((stem, place["path"]), []).append("" if place["layer"] is None else str(place["layer"]))
    found = []
    for (stem, path), numbers in layers.items():
        inner = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
        dotted = rf"\.{inner}\." if numbers != [""] else ""
        found.append(f"{re.escape(stem)}{dotted}{re.escape(path)}")
    return found
