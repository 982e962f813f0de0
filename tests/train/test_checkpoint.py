"""Checkpoints: the newest whole one is taken, damage is named, none is lost while another is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftrun.errors import UserError
from ftrun.optim.state import flatten
from ftrun.runs import digest
from ftrun.train import checkpoint
from ftrun.train.checkpoint import Checkpoint, latest, load, save
from ftrun.train.generators import random_state
from ftrun.train.loop import Progress


def sample(step: int) -> Checkpoint:
    weight = torch.nn.Parameter(torch.full((4,), float(step)))
    optimiser = torch.optim.AdamW([weight])
    weight.grad = torch.ones(4)
    optimiser.step()
    tensors, meta = flatten(optimiser)
    belongs = {"base": "abc"}
    files = {"metrics.jsonl": b'{"step": 1}\n'}
    return Checkpoint(Progress(step), {"w": weight.detach()}, tensors, meta, random_state(), belongs, files)


def edit_state(folder: Path, change: Callable[[dict], object]) -> None:
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))
    checkpoint.commit(folder)  # as if it had been saved so


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "optimiser.safetensors")
    tensors.pop("0.exp_avg")
    save_file(tensors, folder / "optimiser.safetensors")
    right = digest(folder / "optimiser.safetensors")
    edit_state(folder, lambda state: state["files"].update({"optimiser.safetensors": right}))


def flip_a_byte(folder: Path) -> None:
    raw = bytearray((folder / "trained.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "trained.safetensors").write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "state.json").write_text("{"), "damaged"),
        (lambda f: (f / "trained.safetensors").unlink(), "No such file"),
        (lambda f: edit_state(f, lambda s: s["optimiser"].pop("groups")), "groups"),
        (lambda f: edit_state(f, lambda s: s.pop("progress")), "lacks 'progress'"),
        (lambda f: edit_state(f, lambda s: s["progress"].update(step="9")), "no progress"),
        (lose_a_tensor, "0.exp_avg is missing"),
        (flip_a_byte, "not what was saved"),
        (lambda f: f.rename(f.parent / "step-99"), "it is that of step 2"),
        (lambda f: edit_state(f, lambda s: s.pop("files")), "lacks 'files'"),
        (lambda f: edit_state(f, lambda s: s["files"].pop("trained.safetensors")), "no hash of its tensors"),
        (lambda f: (f / "commit.json").unlink(), "No such file"),
        (lambda f: (f / "state.json").write_text('{"a":' * 20_000), "recursion"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    save(tmp_path, sample(1))
    save(tmp_path, sample(2))
    damage(tmp_path / "step-2")
    heard: list[str] = []
    found = latest(tmp_path, heard.append)
    assert found is not None
    assert found.progress.step == 1
    assert torch.equal(found.trained["w"], sample(1).trained["w"])
    assert len(heard) == 1
    assert said in heard[0]
    assert "step-" in heard[0]


def test_none_is_whole(tmp_path: Path) -> None:
    save(tmp_path, sample(1))
    (tmp_path / "step-1/state.json").unlink()
    with pytest.raises(UserError, match=r"step-1: .*No other is whole"):
        latest(tmp_path, print)
    assert latest(tmp_path / "nowhere", print) is None


def test_the_newest_two_are_kept_and_a_damaged_later_one_counts_for_none(tmp_path: Path) -> None:
    (tmp_path / "step-98").mkdir()
    (tmp_path / "step-99").mkdir()
    for step in (1, 2, 3):
        save(tmp_path, sample(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-2", "step-3", "step-98", "step-99"]


def test_every_byte_is_checked(tmp_path: Path) -> None:
    folder = save(tmp_path, sample(2))
    files = sorted(folder.iterdir())
    assert len(files) == 6
    for path in files:
        whole = path.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 40)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(UserError, match="damaged"):
                load(folder)
        path.write_bytes(whole)
    assert load(folder).progress.step == 2


def test_what_it_belongs_to_and_the_records_come_back(tmp_path: Path) -> None:
    found = load(save(tmp_path, sample(1)))
    assert (found.belongs, found.files) == ({"base": "abc"}, {"metrics.jsonl": b'{"step": 1}\n'})


def test_those_of_before_there_was_a_marker_are_taken(tmp_path: Path) -> None:
    save(tmp_path, sample(1))
    edit_state(tmp_path / "step-1", lambda state: [state.pop(key) for key in ("belongs", "files", "format")])
    (tmp_path / "step-1/commit.json").unlink()
    assert (load(tmp_path / "step-1").belongs, load(tmp_path / "step-1").files) == ({}, {})


def test_the_best_stays_until_the_next_best_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, sample(1), "best")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, sample(2), "best")
    assert load(tmp_path / "best").progress.step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
