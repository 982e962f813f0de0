"""Filling a skeleton: every family against transformers, errors by name, the cache, bitsandbytes folders, memory."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ftrun.errors import UserError
from ftrun.models import quantised
from ftrun.models.base import Base, open_base
from ftrun.models.experts import GROUPED, register_experts
from ftrun.models.load import fill, prepare
from ftrun.models.options import Options
from ftrun.models.quant import fp4, int8, nf4, none
from ftrun.models.quant.base import QuantisedLinear, Quantiser, Stored
from ftrun.models.skeleton import skeleton
from tests.families import FAMILIES, edit_config, save_tiny, tiny

IDS = torch.arange(24).view(1, -1) % 200 + 5
NONE, NF4 = none.Quantiser(none.Options()), nf4.Quantiser(nf4.Options())


def base_of(folder: Path, dtype: str = "float32", **options) -> Base:
    return open_base(Options(path=str(folder), dtype=dtype, **options), "tiny", folder.parent / "cache", print)


def load(base: Base, quantiser: Quantiser = NONE, said: list[str] | None = None):
    model = skeleton(base)
    fill(model, base, quantiser, "cpu", base.cache, [].append if said is None else said.append)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def theirs(folder: Path, dtype: torch.dtype = torch.float32, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    if any(p.dim() == 3 for p in model.parameters()):
        register_experts()  # one order of sums: what is compared is what was loaded
        model.set_experts_implementation(GROUPED)
    return model


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = change(dict(safetensors.torch.load_file(path)))
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_logits_of_transformers_exactly(family, tmp_path):
    folder = save_tiny(family, tmp_path / "m", shard="100KB")
    model = load(base_of(folder))
    assert torch.equal(logits(model), logits(theirs(folder)))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mixtral"])
@pytest.mark.parametrize("quantiser", [NF4, fp4.Quantiser(fp4.Options()), int8.Quantiser(int8.Options())])
def test_a_quantised_base_comes_back_from_the_cache_as_it_was(family, quantiser, tmp_path):
    folder = save_tiny(family, tmp_path / "m", shard="100KB")
    said: list[str] = []
    first, second = (load(base_of(folder), quantiser, said) for _ in range(2))
    assert "quantising" in said[0]
    assert "from the cache" in said[-1]
    assert torch.equal(logits(first), logits(second))
    exact = logits(theirs(folder))
    assert 0 < (logits(first) - exact).norm() / exact.norm() < 0.5
    assert {k: (v.shape, v.dtype) for k, v in first.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in second.state_dict().items()
    }
    (kept,) = (tmp_path / "cache" / "quantised").iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    with safetensors.safe_open(kept / "model.safetensors", "pt") as file:
        name = next(n for n in file.keys() if n.endswith(".packed"))  # noqa: SIM118
        assert torch.equal(file.get_tensor(name), first.state_dict()[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_bare_plan_has_the_bytes_of_the_filled_model(family, tmp_path):
    base = base_of(save_tiny(family, tmp_path / "m"))
    planned = skeleton(base)
    names = prepare(planned, NF4, base)
    model = load(base, NF4)
    assert {k: (v.shape, v.dtype) for k, v in planned.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in model.state_dict().items()
    }
    held = [m for m in model.modules() if isinstance(m, Stored)]
    for module in held:
        said = NF4.bytes_for(*module.shape)
        assert said == {k: sum(t.numel() * t.itemsize for t in ts) for k, ts in module.parts().items()}
    assert len(names) == len(held) - (2 if family == "mixtral" else 0)
    assert "lm_head" not in names


def test_ends_are_tied_again(tmp_path):
    model = load(base_of(save_tiny("qwen2", tmp_path / "m")), NF4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load(base_of(tmp_path / "m"), NF4).lm_head.weight.data_ptr() != 0


def test_older_names_of_tensors(tmp_path):
    """A prefix more or less, and buffers that older versions of transformers saved."""
    folder = save_tiny("gpt2", tmp_path / "m")
    expected = logits(theirs(folder))
    rewrite(folder, lambda ts: {k.removeprefix("transformer."): t for k, t in ts.items()})
    assert torch.equal(logits(load(base_of(folder))), expected)
    llama = save_tiny("llama", tmp_path / "l")
    expected = logits(theirs(llama))
    rewrite(llama, lambda ts: {**ts, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert torch.equal(logits(load(base_of(llama))), expected)


def test_new_tokens_start_as_the_mean_of_the_others(tmp_path):
    folder = save_tiny("llama", tmp_path / "m", vocab_size=261)
    model = load(base_of(folder, new_tokens=["<a>", "<b>"]), NF4)
    table = model.model.embed_tokens.weight
    assert table.shape[0] == 263
    torch.testing.assert_close(table[261], table[:261].mean(0))
    assert torch.equal(model.lm_head.weight[261], model.lm_head.weight[262])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ts: {k: t for k, t in ts.items() if "q_proj" not in k}, r"lack .*layers\.0\.self_attn\.q_proj\.weight"),
        (lambda ts: {**ts, "model.layers.0.self_attn.q_prj.weight": torch.ones(2)}, r"no place for .*q_prj.*nearest"),
        (lambda ts: {**ts, "model.norm.weight": torch.ones(3)}, r"model\.norm\.weight.*\[3\].*expects \[64\]"),
    ],
)
@pytest.mark.parametrize("quantiser", [NONE, NF4])
def test_files_that_do_not_belong_to_the_config_are_named(change, message, quantiser, tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        load(base_of(folder), quantiser)
    assert not list((tmp_path / "cache").glob("quantised/*"))
    assert not list((tmp_path / "cache").glob("quantised/.*"))


def test_experts_that_are_not_all_there_are_named(tmp_path):
    folder = save_tiny("mixtral", tmp_path / "m")
    rewrite(folder, lambda ts: {k: t for k, t in ts.items() if "experts.3.w1" not in k})
    with pytest.raises(UserError, match=r"experts\.gate_up_proj"):
        load(base_of(folder))


@pytest.mark.parametrize("hurt", ["bytes", "cut", "sums"])
def test_a_damaged_cache_is_built_again_with_a_warning(hurt, tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    expected = logits(load(base_of(folder), NF4))
    (kept,) = (tmp_path / "cache" / "quantised").iterdir()
    path = kept / ("sums.json" if hurt == "sums" else "model.safetensors")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data[: -1 if hurt == "cut" else None] if hurt != "sums" else b"{")
    said: list[str] = []
    assert torch.equal(logits(load(base_of(folder), NF4, said)), expected)
    assert said[0].startswith("warning: ")
    assert "damaged" in said[0]
    said.clear()
    load(base_of(folder), NF4, said)
    assert ["from the cache" in text for text in said] == [True]


def test_the_cache_is_keyed_by_source_scheme_and_dtype(tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    load(base_of(folder), NF4)
    load(base_of(folder, dtype="bfloat16"), NF4)
    load(base_of(folder), nf4.Quantiser(nf4.Options(skip=["down_proj"])))
    rewrite(folder, lambda ts: {**ts, "model.norm.weight": torch.full((64,), 2.0)})
    load(base_of(folder), NF4)
    assert len(list((tmp_path / "cache" / "quantised").iterdir())) == 4


def test_a_disk_that_takes_no_cache_costs_the_cache_alone(tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "m")
    expected = logits(load(base_of(folder), NF4))
    quantised.Cached(tmp_path / "cache", {}).folder.parent.rename(tmp_path / "away")

    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantised.Writer, "add", full)
    said: list[str] = []
    assert torch.equal(logits(load(base_of(folder), NF4, said)), expected)
    assert any("No space left" in text for text in said)
    assert not list((tmp_path / "cache" / "quantised").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": ["down_prj"]}, r"quant\.skip: no module .* 'down_prj'.* 'down_proj'"),
        ({"skip": ["model"]}, "nothing|no module"),
    ],
)
def test_a_skip_that_means_nothing_is_an_error(options, message, tmp_path):
    base = base_of(save_tiny("llama", tmp_path / "m"))
    if options["skip"] == ["model"]:
        options = {"skip": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    with pytest.raises(UserError, match=message):
        prepare(skeleton(base), nf4.Quantiser(nf4.Options(**options)))


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    """A bitsandbytes 4-bit checkpoint, made by transformers on the CPU from a bfloat16 model."""
    root = tmp_path_factory.mktemp("packed")
    # rows of whole blocks: bitsandbytes' own CPU kernel is wrong on others
    folder = save_tiny("llama", root / "plain", dtype=torch.bfloat16, intermediate_size=128)
    scheme = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    made = theirs(folder, torch.bfloat16, quantization_config=scheme)
    made.save_pretrained(root / "packed")
    # in eval mode it repacks its weights for some CPUs
    return root / "packed", made.train()


def test_a_bitsandbytes_folder_is_taken_as_it_is(packed_folder):
    folder, made = packed_folder
    base = base_of(folder, dtype="bfloat16")
    assert base.prequantised
    planned = skeleton(base)
    names = prepare(planned, NF4, base)
    said: list[str] = []
    model = load(base, NF4, said)
    assert names == [n for n, m in model.named_modules() if isinstance(m, QuantisedLinear)]
    assert {k: v.shape for k, v in planned.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        for name in names:
            module = model.get_submodule(name)
            assert torch.equal(module.packed, file.get_tensor(f"{name}.weight"))
            assert torch.equal(module.absmax, file.get_tensor(f"{name}.weight.absmax"))
            assert torch.equal(module.nested_absmax, file.get_tensor(f"{name}.weight.nested_absmax"))
            assert torch.equal(module.offset, made.get_submodule(name).weight.quant_state.offset)
    assert "as the files have it" in said[-1]
    # the same bytes through the same products, up to one rounding of bfloat16 in each of 14 of them
    exact, found = logits(made).float(), logits(model).float()
    assert (found - exact).norm() / exact.norm() < 2**-7


def test_what_the_job_asks_must_be_what_the_folder_holds(packed_folder):
    base = base_of(packed_folder[0], dtype="bfloat16")
    for quantiser in (NONE, nf4.Quantiser(nf4.Options(block_size=128)), int8.Quantiser(int8.Options())):
        with pytest.raises(UserError, match=re.escape("say quant=nf4 quant.block_size=64 quant.double_quant=true")):
            load(base, quantiser)


def test_a_folder_that_says_it_is_quantised_and_is_not(tmp_path):
    folder = save_tiny("llama", tmp_path / "m")
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UserError, match="no weight of it is"):
        load(base_of(folder), NF4)


STREAM = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from ftrun.models.load import fill
from ftrun.models.options import Options
from ftrun.models.base import open_base
from ftrun.models.skeleton import skeleton
from ftrun.models.quant import nf4

folder, cache = Path(sys.argv[1]), Path(sys.argv[2])
quantiser = nf4.Quantiser(nf4.Options())
base = open_base(Options(path=str(folder)), "big", cache, print)
base.hash()
model = skeleton(base)
quantiser.storage.quantise(torch.randn(2048, 1024).bfloat16())  # libraries, thread pools
def status(key):
    line = next(l for l in open("/proc/self/status") if l.startswith(key))
    return int(line.split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts here
before = status("VmRSS")
start = time.monotonic()
fill(model, base, quantiser, "cpu", cache, lambda text: None)
held = sum(t.numel() * t.itemsize for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
print(json.dumps({"peak": status("VmHWM") - before, "held": held, "seconds": time.monotonic() - start}))
"""


def big_folder(folder: Path) -> Path:
    """About 400 MB of bfloat16 llama in shards of about 100 MB."""
    config = tiny("llama", 11, hidden_size=1024, intermediate_size=4096, vocab_size=8192)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {k: t.shape for k, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    for number, (name, shape) in enumerate(shapes.items(), 1):
        shard[name] = torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1)
        if sum(t.nbytes for t in shard.values()) > 90e6 or number == len(shapes):
            file = f"model-{number:05d}.safetensors"
            safetensors.torch.save_file(shard, folder / file)
            index |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.slow
def test_host_memory_stays_under_the_quantised_size_and_a_shard(tmp_path):
    folder = big_folder(tmp_path / "big")
    shards = [p.stat().st_size for p in folder.glob("*.safetensors")]
    runs = {}
    for name in ("quantising", "from the cache"):
        done = subprocess.run(
            [sys.executable, "-c", STREAM, str(folder), str(tmp_path / "cache")],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        runs[name] = json.loads(done.stdout.splitlines()[-1])
    total, largest = sum(shards) / 1e6, max(shards) / 1e6
    for name, run in runs.items():
        print(f"{name}: {total:.0f} MB in {len(shards)} shards of {largest:.0f} MB, held {run['held'] / 1e6:.0f} MB,")
        print(f"    peak {run['peak'] / 1e6:.0f} MB in {run['seconds']:.1f} s")
        assert run["peak"] < run["held"] + max(shards)
