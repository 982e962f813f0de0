"""The grammar of layers and targets."""

from __future__ import annotations

import pytest

from ftrun.errors import UserError
from ftrun.selection import check_targets, parse_layers


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("all", range(30)),
        (3, [3]),
        ("3", [3]),
        ("0-7", range(8)),
        ("first:8", range(8)),
        ("last:8", range(22, 30)),
        ("every:10", [0, 10, 20]),
        ([0, 3, "5-7"], [0, 3, 5, 6, 7]),
        (["last:2", 29, "first:1"], [0, 28, 29]),
    ],
)
def test_layers(spec: object, found: object) -> None:
    assert parse_layers(spec, 30) == tuple(found)  # type: ignore[arg-type]
    assert parse_layers(spec) == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("40-50", "the model has 30 layers, 0 to 29; for the last 11 write layers=last:11"),
        ("30", "0 to 29"),
        (-1, "layers=last:1"),
        ("7-0", "Did you mean layers=0-7"),
        ("last:0", "N from 1 to 30"),
        ("last:31", "N from 1 to 30"),
        ("every:31", "N from 1 to 30"),
        ("frist:8", "'first'"),
        ("0,3", "layers=[0,3]"),
        ([], "no layer is named"),
        (True, "expected all"),
        ([0, "x"], "layers=x"),
    ],
)
def test_layers_refused(spec: object, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_layers(spec, 30)  # type: ignore[arg-type]
    assert said in str(caught.value)


@pytest.mark.parametrize("spec", ["7-0", "last:0", "frist:8", -1, "0,3", []])
def test_layers_refused_without_a_model(spec: object) -> None:
    with pytest.raises(UserError, match="layers="):
        parse_layers(spec)  # type: ignore[arg-type]


def test_targets() -> None:
    assert check_targets("all") == ("all",)
    assert check_targets(["q_proj", "attn.c_proj", "re:.*[qv]_proj"]) == ("q_proj", "attn.c_proj", "re:.*[qv]_proj")
    assert check_targets("re:a{1,2}") == ("re:a{1,2}",)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("q_proj,v_proj", "targets=[q_proj,v_proj]"),
        ("re:(", "not a regular expression"),
        ("re:", "the pattern is empty"),
        (".*proj", "targets='re:.*proj'"),
        ([], "no module is named"),
        (["q_proj", ""], "not a module's name"),
        ([3], "no name of a module"),
    ],
)
def test_targets_refused(spec: object, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_targets(spec)  # type: ignore[arg-type]
    assert said in str(caught.value)
