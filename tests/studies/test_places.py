"""Sets under a budget: the best one, an evenly spaced one, one drawn at random; and the overrides that take them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from ftrun.models.select import anatomy
from ftrun.shell import parse
from ftrun.studies.places import best, drawn, items_of, override, spread
from tests.families import tiny_model

KINDS = ("q_proj", "up_proj", "down_proj")


def places(layers: int = 6, kinds: tuple[str, ...] = KINDS) -> list[dict[str, Any]]:
    """Places whose scores and sizes differ: down_proj is twice as large, later layers score more."""
    made = []
    for layer, kind in itertools.product(range(layers), kinds):
        size, path = 20 if kind == "down_proj" else 10, f"mlp.{kind}"
        row = {"name": f"model.layers.{layer}.{path}", "layer": layer, "path": path, "kind": kind, "can": True}
        made.append({**row, "score": layer + 0.1 * len(kind), "norm": 1.0, "parameters": size, "bytes": 4 * size})
    return made


def names(items: list[Any]) -> list[str]:
    return [item.name for item in items]


def test_the_best_layers_are_those_of_the_highest_scores_in_order() -> None:
    items = items_of(places(), "layers", "layers")
    assert names(best(items, 2)) == ["4", "5"]
    assert names(best(list(reversed(items)), 2)) == ["5", "4"]
    assert best(items, 0.5) == []


def test_a_budget_of_parameters_is_filled_by_score_per_cost_and_then_with_what_still_fits() -> None:
    items = items_of(places(3), "modules", "parameters")
    # 10 each but down_proj with 20: the two small ones of layer 2, then of layer 1
    assert [name.split(".", 2)[2] for name in names(best(items, 45))] == [
        "1.mlp.q_proj", "1.mlp.up_proj", "2.mlp.q_proj", "2.mlp.up_proj",
    ]  # fmt: skip
    chosen = best(items, 65)
    assert sum(item.cost for item in chosen) == 60
    assert "model.layers.2.mlp.down_proj" in names(chosen)


def test_what_a_budget_counts() -> None:
    rows = places()
    assert [item.cost for item in items_of(rows, "layers", "modules")] == [3.0] * 6
    assert [item.cost for item in items_of(rows, "layers", "bytes")] == [160.0] * 6
    assert [item.cost for item in items_of(rows, "kinds", "kinds")] == [1.0] * 3
    assert [item.cost for item in items_of(rows, "kinds", "parameters")] == [60.0, 60.0, 120.0]
    outside = {**rows[0], "name": "lm_head", "layer": None, "path": "lm_head", "kind": "head"}
    assert len(items_of([*rows, outside], "layers", "layers")) == 6
    assert len(items_of([*rows, {**rows[0], "can": False, "name": "norm"}], "modules", "modules")) == 18


def test_an_even_set_is_even_over_layers_and_takes_kinds_in_turn() -> None:
    assert names(spread(items_of(places(8), "layers", "layers"), 2)) == ["2", "6"]
    assert names(spread(items_of(places(30), "layers", "layers"), 8)) == ["1", "5", "9", "13", "16", "20", "24", "28"]
    found = spread(items_of(places(6), "modules", "modules"), 6)
    assert [item.at for item in found] == [0, 1, 2, 3, 4, 5]
    assert [item.name.rpartition(".")[2] for item in found] == [*KINDS, *KINDS]
    many = spread(items_of(places(4), "modules", "modules"), 11)
    assert len(set(names(many))) == 11
    assert sum(item.cost for item in spread(items_of(places(), "modules", "parameters"), 55)) <= 55


def test_a_drawn_set_depends_on_its_seed_and_fills_the_budget() -> None:
    items = items_of(places(), "modules", "parameters")
    sets = {tuple(names(drawn(items, 60, f"0 {n}"))) for n in range(20)}
    assert len(sets) > 10
    assert drawn(items, 60, "0 1") == drawn(items, 60, "0 1")
    assert all(50 <= sum(item.cost for item in drawn(items, 60, str(n))) <= 60 for n in range(20))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "opt"])
def test_the_override_takes_exactly_the_chosen_modules(family: str) -> None:
    model = tiny_model(family, layers=12).to(torch.bfloat16)
    sites = anatomy(model, ["all", "head"], "all").sites
    stem = next(site.name.split(f".{site.layer}.")[0] for site in sites if site.layer is not None)
    rows = []
    for site in sites:
        path = site.name if site.layer is None else site.name.removeprefix(f"{stem}.{site.layer}.")
        kind = "head" if site.role == "head" else path
        row = {"name": site.name, "layer": site.layer, "path": path, "kind": kind, "can": True}
        rows.append({**row, "score": 1.0, "parameters": 1, "bytes": 1})
    for unit in ("modules", "kinds"):
        items = items_of(rows, unit, unit)
        for seed in range(3):
            chosen = drawn(items, len(items) // 3, str(seed))
            wanted = {place["name"] for item in chosen for place in item.places}
            (typed,) = parse([f"targets={override(chosen, unit)}"], multirun=False)
            assert {site.name for site in anatomy(model, typed.value, "all").sites} == wanted
