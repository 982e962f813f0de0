"""The options: aliases, patterns by layer and name, and YAMLs that hold every option with its default."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

import ftrun
from ftrun.errors import UserError
from ftrun.methods.patterns import resolve
from ftrun.schema import build, fields_by_key, read_options
from ftrun.values import Site

ROOT = Path(ftrun.__file__).parents[1]
KINDS = ("full", "lora", "dora", "houlsby", "prompt")
SITES = tuple(Site(f"model.layers.{i}.{n}", "q", i, 8, 8) for i in range(4) for n in ("attn.q_proj", "mlp.up_proj"))


def options(kind: str) -> type:
    return read_options(ROOT / "ftrun" / "methods" / f"{kind}.py")


@pytest.mark.parametrize("kind", KINDS)
def test_the_yaml_holds_every_option_with_its_default_and_a_comment(kind: str) -> None:
    text = (ROOT / "conf" / "method" / f"{kind}.yaml").read_text()
    root = yaml.safe_load(text)
    given = {k: root[v[2:-1]] if str(v).startswith("${") else v for k, v in root.pop("method").items()}
    assert given.pop("kind") == kind
    built = build(options(kind), given, "method")
    assert built == options(kind)()
    assert set(given) == set(fields_by_key(options(kind)))
    assert text.splitlines()[1].startswith(f"# ftrun method={kind}")
    for key in {**root, **given}:
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{key}:"))
        assert "#" in line, key


@pytest.mark.parametrize("kind", ["lora", "dora", "houlsby", "prompt"])
def test_from_is_a_key(kind: str) -> None:
    assert build(options(kind), {"from": "runs/a/adapter"}, "method").from_ == "runs/a/adapter"
    with pytest.raises(UserError, match=r"'from_' is unknown.*'from'"):
        build(options(kind), {"from_": "runs/a/adapter"}, "method")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("lora", {"rank": 0}, "method.rank=0: expected an integer, 1 or more"),
        ("lora", {"rank": "abc"}, "method.rank=abc: expected an integer"),
        ("lora", {"dropout": 1.0}, "method.dropout=1.0: .*less than 1"),
        ("lora", {"layers": "first"}, "layers=first"),
        ("lora", {"rank_pattern": {"last:1": 0}}, "method.rank_pattern=.*1 or more"),
        ("lora", {"modules_to_save": ["heads"]}, "method.modules_to_save=.*Did you mean 'head'"),
        ("lora", {"modules_to_save": ["head"], "targets": ["all", "head"]}, "head is also in targets"),
        ("dora", {"init": "gausian"}, "method.init=gausian: .*Did you mean 'gaussian'"),
        ("houlsby", {"placement": "paralel"}, "method.placement=paralel: .*Did you mean 'parallel'"),
        ("full", {"rank": 16}, "the key 'rank' is unknown"),
        ("full", {"dtype": "float16"}, "method.dtype=float16"),
        ("prompt", {"tokens": 0}, "method.tokens=0"),
    ],
)
def test_a_wrong_value_is_named(kind: str, values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(options(kind), values, "method")


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        options("lora")().rank = 3


def test_patterns_go_by_layer_and_by_name_and_the_first_that_fits_counts() -> None:
    found = resolve({"last:1": 4, r"mlp\.up_proj": 2, "0-1": 3}, "rank_pattern", SITES, 4, 16)
    by_leaf = {leaf: [found[s.name] for s in SITES if s.name.endswith(leaf)] for leaf in ("q_proj", "up_proj")}
    assert by_leaf == {"q_proj": [3, 3, 16, 4], "up_proj": [2, 2, 2, 4]}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("q_prj", "method.rank_pattern: 'q_prj' fits none of the selected weights. Did you mean 'q_proj'"),
        ("last:9", "last:9"),
        ("q_proj(", "no regular expression"),
        ("proj", "fits none"),
    ],
)
def test_a_pattern_that_fits_nothing_is_an_error(entry: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve({entry: 4}, "rank_pattern", SITES, 4, 16)
