"""Help: ours, readable, and drawn from what is there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ftrun import cli
from ftrun.compose import choices_of
from ftrun.help import described
from ftrun.job import GROUPS, ROOMS, Job


def shown(capsys: pytest.CaptureFixture[str], *typed: str) -> str:
    assert cli.main([*typed, "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "hydra" not in text.lower().replace("hydra's view", "")
    return text


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys)
    words = set(text.replace(",", " ").replace(":", " ").split())
    for group in GROUPS:
        assert f"{group}=" in words
        assert set(choices_of(group)) <= words, group
    for field in dataclasses.fields(Job):
        if field.name not in ROOMS and field.name != "tree":
            assert f"\n  {field.name}=" in text
    for key in ("rank=16", "alpha=32", "targets=all", "layers=all", "job=FILE", "-m, --multirun", "--cfg job"):
        assert key in text
    assert all(f"\n  {verb} " in text for verb in cli.VERBS)
    assert text.count("\n  rank=") == 1
    assert "ftrun method=qlora rank=16" in text


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb not in cli.INSTEAD])
def test_every_verb_has_its_own(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, verb)
    assert text.startswith(f"ftrun {verb} ")
    for one in described(()):
        assert f"  {one.key}={one.default}" in text
        assert one.doc
    for group in ROOMS:
        assert f"\n{group}=" in text
    assert text != shown(capsys)


@pytest.mark.parametrize("verb", list(cli.INSTEAD))
def test_a_verb_without_a_job_tells_of_itself_alone(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, verb)
    assert text.startswith(f"ftrun {verb} {cli.INSTEAD[verb]}".strip() + " [KEY=VALUE ...]")
    assert "Options of this verb" in text
    assert "micro_batch" not in text


def test_a_verbs_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert "rows=3" in shown(capsys, "data")
    assert "format=text" in shown(capsys, "data")


def test_help_on_another_choice(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "train", "method=prompt", "optim=sgd")
    assert "method=prompt: " in text
    assert "method.tokens=20" in text
    assert "optim.momentum=" in text
    assert "rank=" not in text


def test_help_on_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "method=loar", "--help"]) == 2
    assert "Did you mean 'lora'" in capsys.readouterr().err


def test_the_docstring_of_a_task_is_its_help() -> None:
    for verb in cli.VERBS:
        path = cli.task_file(verb)
        # `eval` is a function of Python's: its file has another name
        assert path == Path(cli.__file__).parent / "tasks" / f"{'evaluate' if verb == 'eval' else verb}.py"
        assert path.is_file()
