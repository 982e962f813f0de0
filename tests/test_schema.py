"""Typed options: what a YAML value becomes, what is refused, and classes read without their files' imports."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ftrun.errors import UserError
from ftrun.schema import build, option, read_check, read_options


@dataclass(frozen=True)
class Sample:
    rank: int = option(16, "rank", ge=1)
    lr: float | None = option(None, "rate", gt=0)
    spec: str | list[str] = option("all", "which")
    betas: tuple[float, ...] = option((0.9, 0.99), "decays", ge=0, lt=1)
    pattern: dict[str, int] = option({}, "ranks", ge=1)
    mode: str = option("fast", "how", choices=("fast", "reference"))
    every: int | str = option("auto", "steps, or auto", ge=1, pattern="auto")
    on: bool = option(False, "whether")
    from_: str | None = option(None, "where from", alias="from")
    many: int | str = option(5, "how often", pattern=r"\d+min", form="steps as 50, or time as 10min")
    tokens: list[str] = option([], "tokens")
    anything: dict[str, Any] = option({}, "facts")


@pytest.mark.parametrize(
    ("values", "key", "made"),
    [
        ({"rank": 3}, "rank", 3),
        ({"lr": 1}, "lr", 1.0),
        ({"lr": "1e-4"}, "lr", 1e-4),
        ({"lr": None}, "lr", None),
        ({"spec": ["a", "b"]}, "spec", ["a", "b"]),
        ({"betas": [0.5, 0]}, "betas", (0.5, 0.0)),
        ({"pattern": {"a": 2}}, "pattern", {"a": 2}),
        ({"every": 5}, "every", 5),
        ({"from": "x"}, "from_", "x"),
        ({"anything": {"a": [1, {"b": None}]}}, "anything", {"a": [1, {"b": None}]}),
    ],
)
def test_values_become_their_types(values: dict[str, Any], key: str, made: Any) -> None:
    found = getattr(build(Sample, values), key)
    assert found == made
    assert type(found) is type(made)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": 0}, "g.rank=0: expected an integer, 1 or more"),
        ({"rank": "x"}, "g.rank=x: expected an integer, 1 or more, found text"),
        ({"rank": True}, "g.rank=true: expected an integer"),
        ({"rank": 2.0}, "found a number"),
        ({"rank": None}, "g.rank=null: expected an integer"),
        ({"lr": -1}, "g.lr=-1: expected a number or null, more than 0"),
        ({"lr": float("nan")}, "expected a number"),
        ({"lr": "fast"}, "found text"),
        ({"betas": [0.5, 1]}, "0 or more and less than 1"),
        ({"betas": 0.5}, "expected a list"),
        ({"pattern": {"a": 0}}, "a mapping {key: an integer}, 1 or more"),
        ({"pattern": {"a": "b"}}, "a mapping {key: an integer}"),
        ({"mode": "fsat"}, "one of fast, reference. Did you mean 'fast'?"),
        ({"every": "sometimes"}, "steps, or auto"),
        ({"many": "few"}, "g.many=few: expected steps as 50, or time as 10min"),
        ({"tokens": [1, "a"]}, "expected a list [a,b] of text, found a list with 1, an integer; as text it is ['1']"),
        ({"lr": float("nan")}, "found what is no number"),
        ({"lr": float("inf")}, "found infinity, or a number too large"),
        ({"on": 1}, "expected true or false, found an integer"),
        ({"rnak": 1}, "Did you mean 'rank'"),
        ({"from_": "x"}, "is unknown"),
        ({"rank": "y" * 10_000}, "…"),
    ],
)
def test_what_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        build(Sample, values, "g")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


def test_names_of_the_user() -> None:
    with pytest.raises(UserError, match=r"^rank=0: "):
        build(Sample, {"rank": 0}, "method", {"method.rank": "rank"})


FILE = '''
"""A variant that no test can afford to import."""
from __future__ import annotations
import os
from dataclasses import dataclass
import nothing_of_that_name
from nothing_of_that_name import Layer
from ftrun.errors import UserError
from ftrun.schema import option

LEAST = _least()

@dataclass(frozen=True)
class Base:
    size: int = option(LEAST, "size", ge=LEAST)

@dataclass(frozen=True)
class Options(Base):
    path: str | None = option(None, "where")

    def __post_init__(self) -> None:
        _checked(self)

class Module(Layer):
    x = nothing_of_that_name.y

def check(options: Options) -> Layer:
    if options.path and not os.path.exists(options.path):
        raise UserError(f"no {options.path}")

def _least() -> int:
    return 2

def _checked(options: nothing_of_that_name.Options) -> nothing_of_that_name.Result:
    if options.size > 8:
        raise UserError("size: too large")
'''


def test_options_are_read_without_the_rest_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "variant.py"
    # what a constant calls has to stand above it; the rest may stand in any order
    path.write_text(FILE.replace("LEAST = _least()", "LEAST = 2"))
    options = read_options(path)
    assert build(options, {"size": 4}).size == 4
    with pytest.raises(UserError, match="too large"):
        build(options, {"size": 9})
    check = read_check(path)
    assert check is not None
    check(build(options, {"path": str(path)}))
    with pytest.raises(UserError, match="no /nowhere"):
        check(build(options, {"path": "/nowhere"}))
    assert "nothing_of_that_name" not in sys.modules


def test_two_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    made = []
    for folder, kind in (("a", "int"), ("b", "str")):
        path = tmp_path / folder / "none.py"
        path.parent.mkdir()
        path.write_text(
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            f"Kind = {kind}\n@dataclass(frozen=True)\nclass Options:\n    x: Kind\n"
        )
        made.append(read_options(path))
    assert build(made[0], {"x": 1}).x == 1
    assert build(made[1], {"x": "one"}).x == "one"
    with pytest.raises(UserError, match="found text"):
        build(made[0], {"x": "one"})


def test_a_file_without_options(tmp_path: Path) -> None:
    path = tmp_path / "plain.py"
    path.write_text("x = 1\n")
    with pytest.raises(KeyError, match="Options"):
        read_options(path)
    assert read_check(path) is None
