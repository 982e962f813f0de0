"""Uploading, against a stand-in of the hub on this machine: what goes, what stays, what is said when it fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from ftrun import cli
from ftrun.runs import cache_dir
from ftrun.tasks import train
from tests.jobs import tiny_job
from tests.tasks.hub import TOKEN, Hub, hub


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, and that run merged."""
    place = tmp_path_factory.mktemp("push")
    train.run(tiny_job(place, "method=lora", "rank=4", "steps=2", "lr=1e-2", "eval.retention=0"))
    assert cli.main(["merge", f"run={place}/run", f"out={place}/merged", "measure=false"]) == 0
    return place


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub() as held:
        monkeypatch.setattr(constants, "ENDPOINT", held.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield held


@pytest.mark.parametrize("result", [{"status": "finished"}, {"status": "finished", "base": [], "steps": 1}])
def test_a_result_that_lacks_what_a_card_tells(
    result: dict[str, object], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "run/result.json").write_text(json.dumps(result))
    assert push(tmp_path, "dry=true") == 2
    assert capsys.readouterr().err.startswith(f"ftrun: run={tmp_path}/run: no card can be made of it: ")


def push(place: Path, *more: str) -> int:
    return cli.main(["push", f"run={place}/run", "repo=me/mine", *more])


def test_the_adapter_with_its_card_and_job(place: Path, served: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(place, "private=true") == 0
    repo = served.repos["me/mine"]
    assert repo["private"]
    files = repo["files"]
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "provenance.json", "job.yaml"}
    assert set(files) == names
    assert files["adapter_model.safetensors"] == (place / "run/adapter/adapter_model.safetensors").read_bytes()
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    assert "me/mine/commit/" in said
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert 'PeftModel.from_pretrained(base, "me/mine")' in card.text
    # no place of this machine, no token
    for content in files.values():
        for secret in (str(place), str(cache_dir()), TOKEN, str(Path.home()) + "/"):
            assert secret.encode() not in content
    job = yaml.safe_load(files["job.yaml"])
    assert job["model"]["path"] == "llama"
    assert job["data"]["path"] == "rows.jsonl"
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "llama"


def test_a_merged_model(place: Path, served: Hub) -> None:
    assert push(place, f"what={place}/merged") == 0
    files = served.repos["me/mine"]["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= set(files)
    assert files["model.safetensors"] == (place / "merged/model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert "PeftModel" not in card.text
    assert not any(str(place).encode() in content for content in files.values())


def test_a_dry_run_asks_no_network(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert constants.is_offline_mode()
    assert push(place, "dry=true") == 0
    said = capsys.readouterr().out
    assert "adapter_model.safetensors" in said
    assert "nothing is uploaded" in said


def test_without_a_network(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(place) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "does not know the token"), (403, "may not write to me/mine"), (404, "does the organisation exist")],
)
def test_what_the_hub_refuses_is_said_without_the_token(
    place: Path, served: Hub, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    served.status = status
    assert push(place) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert TOKEN not in out + err
    assert "Traceback" not in err
    assert not served.repos


def test_no_token_and_another_token(
    place: Path, served: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert push(place) == 2
    assert "does not know the token" in (said := capsys.readouterr().err)
    assert "hf_another" not in said
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    served.asked.clear()
    assert push(place) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert not served.asked


def test_nobody_answers(
    place: Path, served: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(place) == 2
    assert "cannot be reached" in (said := capsys.readouterr().err)
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["repo=mine"], "expected ORG/NAME"),
        (["what=nowhere"], "the folder of a merged model"),
    ],
)
def test_what_is_asked_wrongly(place: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(place, *more) == 2
    assert said in capsys.readouterr().err
