"""Each way in which an adapter and a base can fail to belong together: seen by `check`, and when it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftrun import cli
from ftrun.compose import compose
from ftrun.errors import UserError
from ftrun.runs import cache_dir
from ftrun.tasks import train
from ftrun.tasks.tuned import open_tuned
from tests.jobs import tiny_base, tiny_job, write_rows

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module", params=["lora", "qlora"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and a finished run; over plain weights and over NF4."""
    place = tmp_path_factory.mktemp(request.param)
    train.run(tiny_job(place, f"method={request.param}", "rank=4", "steps=2", "lr=1e-2", "eval=none"))
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil: the base at its own place, for its path is in the job."""
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copytree(trained / "llama", tmp_path / "llama")
    return tmp_path


def check(place: Path, *more: str) -> int:
    """The exit code of the verb over the copied base."""
    return cli.main(["check", f"run={place}/run", f"model.path={place}/llama", "format=json", *more])


def refused(place: Path, said: str, capsys: pytest.CaptureFixture[str], *more: str) -> None:
    """`check` exits with 2 and says so; training from it, and opening it again, are refused with the same words."""
    capsys.readouterr()
    assert check(place, *more) == 2
    out, err = capsys.readouterr()
    assert not json.loads(out)["sound"]
    assert said in err
    assert "Traceback" not in err
    overrides = [f"job={place}/run/job.yaml", f"model.path={place}/llama", *more]
    again = compose([*overrides, f"method.from={place}/run/adapter", f"out={place}/again"])
    with pytest.raises(UserError) as error:
        train.run(again)
    assert said in str(error.value)
    with pytest.raises(UserError) as error:
        open_tuned(place / "run", compose(overrides), cache_dir(), print)
    assert said in str(error.value)


def goes_on(place: Path, said: str, capsys: pytest.CaptureFixture[str], *more: str) -> None:
    """With allow_drift=true all three go on, and say what differs."""
    capsys.readouterr()
    assert check(place, "allow_drift=true", *more) == 0
    found = json.loads(capsys.readouterr().out)
    assert said in {one["what"] for one in found["findings"] if one["state"] == "allowed"}
    overrides = [f"job={place}/run/job.yaml", f"model.path={place}/llama", "allow_drift=true", *more]
    told: list[str] = []
    open_tuned(place / "run", compose(overrides), cache_dir(), told.append)
    assert any(f"\n  {said}: " in text for text in told)


def test_a_sound_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(place) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sound"]
    states = {one["what"]: one["state"] for one in found["findings"]}
    same = ("weights", "quantisation", "tokenizer", "template", "files", "modules", "update", "versions")
    assert states == dict.fromkeys(same, "same")
    assert cli.main(["check", f"run={place}/run", f"model.path={place}/llama"]) == 0
    assert capsys.readouterr().out.endswith("sound\n")


def test_one_flipped_bit_in_the_base(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / "llama/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    refused(place, "1 of 21 tensors other: ", capsys)
    goes_on(place, "weights", capsys)


def test_a_bit_that_flips_while_size_and_time_stay(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A disk's fault: the verb reads the bytes, whatever the cache knows of the file."""
    import os

    path = place / "llama/model.safetensors"
    assert check(place) == 0
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert check(place) == 2
    assert "1 of 21 tensors other" in capsys.readouterr().err


def test_another_quantisation(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = "quant=int8"
    refused(place, "Store the base as it was", capsys, other)
    goes_on(place, "quantisation", capsys, other)


def test_another_tokenizer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / "llama/tokenizer.json"
    facts = json.loads(path.read_text())
    vocabulary = facts["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(facts))
    refused(place, "Other tokens mean other rows", capsys)
    goes_on(place, "tokenizer", capsys)


def test_another_template(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / "llama/chat_template.jinja"
    path.write_text(path.read_text() + "{# #}")
    refused(place, "Prompts are framed otherwise", capsys)


def test_a_renamed_module(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / "run/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    renamed = {name.replace("layers.0.self_attn.q_proj", "layers.0.self_attn.query"): t for name, t in tensors.items()}
    save_file(renamed, path)
    refused(place, "no module takes the tensor 'base_model.model.model.layers.0.self_attn.query.lora_A", capsys)


def test_another_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model of the hub's, as its cache lies on disk: another commit, whatever the weights."""
    from huggingface_hub import constants

    repo = tmp_path / "hub/models--me--mine"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    tiny_base(repo / "snapshots" / COMMIT)
    shutil.copytree(repo / "snapshots" / COMMIT, repo / "snapshots" / OTHER)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    rows = write_rows(tmp_path / "rows.jsonl")
    common = ["model.path=me/mine", "model.dtype=float32", "data=jsonl", f"data.path={rows}", "device=cpu"]
    common += ["eval=none", "steps=1", "batch=4", "rank=4", "lr=1e-2", f"out={tmp_path}/run"]
    train.run(compose(common))
    assert cli.main(["check", f"run={tmp_path}/run"]) == 0
    capsys.readouterr()
    assert cli.main(["check", f"run={tmp_path}/run", f"model.revision={OTHER}"]) == 2
    assert f"me/mine at {COMMIT}" in (said := capsys.readouterr().err)
    assert f"Set model.revision={COMMIT}" in said
    changed = [f"job={tmp_path}/run/job.yaml", f"model.revision={OTHER}"]
    with pytest.raises(UserError, match=f"Set model.revision={COMMIT}"):
        train.run(compose([*changed, f"method.from={tmp_path}/run/adapter", f"out={tmp_path}/again"]))
    with pytest.raises(UserError, match=f"Set model.revision={COMMIT}"):
        open_tuned(tmp_path / "run", compose(changed), cache_dir(), print)
    assert cli.main(["check", f"run={tmp_path}/run", f"model.revision={OTHER}", "allow_drift=true"]) == 0


# the adapter itself


def spoilt(place: Path, change: object) -> None:
    path = place / "run/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: change(name, t) for name, t in tensors.items()}, path)  # type: ignore[operator]
    note = place / "run/adapter/provenance.json"
    note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "files"}))


def test_an_adapter_that_does_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoilt(place, lambda name, t: t * 0 if "lora_B" in name else t)
    assert check(place) == 2
    assert "the adapter does nothing" in capsys.readouterr().err


def test_updates_of_which_some_do_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoilt(place, lambda name, t: t * 0 if "layers.0.mlp.up_proj.lora_B" in name else t)
    assert check(place) == 0
    notes = [f["detail"] for f in json.loads(capsys.readouterr().out)["findings"] if f["state"] == "note"]
    assert any(n.startswith("1 of 14 updates do nothing") for n in notes)


def test_values_that_are_no_number(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoilt(place, lambda name, t: torch.full_like(t, torch.nan) if "0.mlp.up_proj.lora_A" in name else t)
    assert check(place) == 2
    assert "no number" in capsys.readouterr().err


@pytest.mark.parametrize(("damage", "said"), [("cut", "cut short"), ("bit", "it was changed"), ("gone", "is missing")])
def test_a_damaged_file(place: Path, damage: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / "run/adapter/adapter_model.safetensors"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-40] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    assert check(place) == 2
    assert said in capsys.readouterr().err


def test_other_versions_are_a_note(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = place / "run/adapter/provenance.json"
    facts = json.loads(note.read_text())
    facts["versions"]["torch"] = "2.0.0"
    note.write_text(json.dumps(facts))
    assert check(place) == 0
    assert "torch 2.0.0, now " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ([1], "expected a JSON object, found list"),
        ({"files": ["a"]}, "expected names and hashes, found ['a']"),
        ({"files": {"adapter_model.safetensors": 7}}, "sha256 7 as training wrote it"),
        ({"versions": ["a"]}, "expected packages, found ['a']"),
    ],
)
def test_a_damaged_record(place: Path, change: object, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    note = place / "run/adapter/provenance.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), **change} if isinstance(change, dict) else change))
    assert check(place) == 2
    assert said in (told := capsys.readouterr().err)
    assert "Traceback" not in told


def test_a_package_that_is_not_here(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = place / "run/adapter/provenance.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "versions": {"nowhere-to-be-had": "1.0"}}))
    assert check(place) == 0
    assert "nowhere-to-be-had 1.0, now not installed" in capsys.readouterr().out


def test_a_result_that_is_no_object(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "run/result.json").write_text("[1]")
    for verb, more in (("generate", ["prompt=a"]), ("push", ["repo=me/mine", "dry=true"]), ("train", [])):
        words = [f"run={place}/run"] if verb != "train" else [f"job={place}/run/job.yaml", f"out={place}/run"]
        assert cli.main([verb, *words, *more]) == 2
        assert f"{place}/run/result.json: damaged: expected a JSON object" in capsys.readouterr().err


def test_a_folder_without_a_record(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "run/adapter/provenance.json").unlink()
    assert check(place) == 2
    assert "nothing can be compared" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_model_trained_in_full(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.run(tiny_job(tmp_path, "method=full", "steps=1", "eval=none", family=family))
    assert cli.main(["check", f"run={tmp_path}/run"]) == 0
    path = next((tmp_path / "run/model").glob("*.safetensors"))
    whole = load_file(path)
    name = next(n for n in whole if n.endswith("q_proj.weight"))
    save_file({n.replace("q_proj", "query") if n == name else n: t for n, t in whole.items()}, path, {"format": "pt"})
    capsys.readouterr()
    assert cli.main(["check", f"run={tmp_path}/run"]) == 2
    assert "the model has no place for" in capsys.readouterr().err
    shutil.copyfile(tmp_path / family / "model.safetensors", path)
    assert cli.main(["check", f"run={tmp_path}/run"]) == 2
    assert "no weight has changed" in capsys.readouterr().err
    data = bytearray((tmp_path / family / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / family / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="tensors other"):
        open_tuned(tmp_path / "run", compose([f"job={tmp_path}/run/job.yaml"]), cache_dir(), print)
    assert cli.main(["check", f"run={tmp_path}/run"]) == 2


def test_a_run_that_is_not_at_its_end(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(place / "run/adapter")
    assert check(place) == 2
    assert "not at its end" in capsys.readouterr().err
    assert cli.main(["check"]) == 2
    assert "ftrun check run=DIR" in capsys.readouterr().err
