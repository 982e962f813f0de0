"""A run merged: transformers alone loads the result, and its logits are ours unmerged, within the target's bound."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftrun import cli
from ftrun.compose import compose
from ftrun.errors import UserError
from ftrun.runs import cache_dir
from ftrun.tasks import train
from ftrun.tasks.merge import Merging, Options, told
from ftrun.tasks.merging import Output
from ftrun.tasks.tuned import open_tuned
from tests.jobs import tiny_job
from tests.methods.tuned import far, logits

EXACT = 1e-5  # of the largest logit, float32
CPU_PRODUCT = 5e-2  # where bitsandbytes' CPU kernel multiplies in bfloat16, for inference alone
COMMON = ("steps=2", "lr=1e-2", "eval=none")


def trained(place: Path, *more: str, family: str = "llama") -> Path:
    train.run(tiny_job(place, *COMMON, *more, family=family))
    return place / "run"


def merged(place: Path, *more: str) -> dict:
    """`ftrun merge` of the run into place/merged; what its merge.json holds."""
    assert cli.main(["merge", f"run={place}/run", f"out={place}/merged", *more]) == 0
    return json.loads((place / "merged/merge.json").read_text())


def reloaded(place: Path, **options: object) -> torch.nn.Module:
    """The result as transformers alone loads it, with nothing missing and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        place / "merged", **{"dtype": torch.float32, **options}, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def with_plain_products(model: torch.nn.Module) -> torch.nn.Module:
    """Before its first pass: bitsandbytes' products by the dense weight, in the dtype of the numbers."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model


def unmerged(place: Path, *more: str) -> torch.Tensor:
    """The run's own logits, with transformers' attention."""
    job = compose([f"job={place}/run/job.yaml", "kernels=reference", *more])
    return logits(open_tuned(place / "run", job, cache_dir(), print).model)


# method, and what lets each family have it; embeddings and heads, tied and not
CASES = [
    ("llama", "method=lora", "rank=4"),
    ("llama", "method=dora", "rank=4"),
    ("llama", "method=full"),
    ("llama", "method=lora", "rank=4", "method.modules_to_save=[embeddings,head]"),
    ("llama", "method=lora", "rank=4", "targets=[q_proj,embeddings,head]"),
    ("qwen2", "method=lora", "rank=4"),
    ("qwen2", "method=lora", "rank=4", "targets=[q_proj,embeddings]"),
    ("qwen2", "method=lora", "rank=4", "method.modules_to_save=[embeddings]"),
    ("qwen2", "method=full"),
    ("gemma3_text", "method=dora", "rank=4", "method.modules_to_save=[head]"),
    ("gpt2", "method=lora", "rank=4"),
    ("gpt2", "method=dora", "rank=4"),
    ("phi3", "method=lora", "rank=4"),
    ("opt", "method=lora", "rank=4", "method.modules_to_save=[embeddings]"),
    ("mixtral", "method=lora", "rank=4"),
    ("qwen3_moe", "method=lora", "rank=4", "targets=[q_proj,experts]"),
    ("mixtral", "method=full"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
@pytest.mark.few(6)
def test_transformers_alone_loads_it_and_its_logits_are_ours(case: tuple[str, ...], tmp_path: Path) -> None:
    family, *more = case
    trained(tmp_path, *more, family=family)
    report = merged(tmp_path, "measure=false", "shard=40KB")
    assert len(report["files"]) > 1
    found = reloaded(tmp_path)
    own = unmerged(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32).eval()
    assert far(own, logits(base)) > 1e-3
    assert far(logits(found), own) < EXACT
    together = found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert together == found.config.tie_word_embeddings
    assert together == (base.config.tie_word_embeddings and "targets=[q_proj,embeddings]" not in case)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tmp_path / family).chat_template
    assert (tmp_path / "merged/generation_config.json").is_file()
    if report["method"] != "full":
        assert abs(report["targets"]["base"]["lost"]) < 1e-4
        assert report["targets"]["base"]["noise"] < 1e-6


# over NF4: bounds of the largest logit. dequantised: float32 sums. requantised: it is rounded as the base was
QUANTISED = [
    ("llama", "method=qlora"),
    ("llama", "method=dora", "quant=nf4"),
    ("qwen2", "method=qlora", "method.modules_to_save=[embeddings]"),
    ("llama", "method=lora", "quant=nf4", "targets=[q_proj]", "quant.double_quant=false"),
    ("llama", "method=lora", "quant=nf4", "quant.block_size=32", "quant.skip=[down_proj]"),
    ("llama", "method=lora", "quant=fp4"),
    ("gpt2", "method=lora", "quant=nf4"),
]


@pytest.mark.parametrize("case", QUANTISED, ids=lambda case: "-".join(case))
@pytest.mark.few(3)
def test_over_a_quantised_base_each_target_is_what_it_says(case: tuple[str, ...], tmp_path: Path) -> None:
    family, *more = case
    trained(tmp_path, "rank=4", *more, family=family)
    own = unmerged(tmp_path)
    merged(tmp_path, "into=dequantised", "measure=false")
    assert far(logits(reloaded(tmp_path)), own) < EXACT
    shutil.rmtree(tmp_path / "merged")

    job = compose([f"job={tmp_path}/run/job.yaml", "kernels=reference"])
    plain = open_tuned(tmp_path / "run", job, cache_dir(), print, plain=True)
    merged(tmp_path, "into=base", "measure=false")
    assert far(logits(reloaded(tmp_path)), logits(plain.model)) < EXACT
    assert far(logits(plain.model), own) > 1e-2
    shutil.rmtree(tmp_path / "merged")

    report = merged(tmp_path, "into=requantised", "measure=false")
    tuned = open_tuned(tmp_path / "run", job, cache_dir(), print)
    with Output(tuned, "requantised", torch.float32).in_place():
        rounded = logits(tuned.model)
    assert torch.equal(logits(tuned.model), own)
    found = reloaded(tmp_path)
    packed = [m for m in found.modules() if type(m).__name__ == "Linear4bit"]
    assert len(packed) == sum(hasattr(m, "parts") for m in tuned.model.modules())
    assert far(logits(found), rounded) < CPU_PRODUCT
    assert far(logits(with_plain_products(reloaded(tmp_path))), rounded) < EXACT
    assert report["targets"]["requantised"]["noise"] > 0


def test_requantised_it_is_a_base_again(tmp_path: Path) -> None:
    """Our own reader takes the file as it is, too."""
    trained(tmp_path, "method=qlora", "rank=4")
    merged(tmp_path, "into=requantised", "measure=false")
    again = tmp_path / "again"
    again.mkdir()
    (again / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    job = tiny_job(again, "method=qlora", f"model.path={tmp_path}/merged", "steps=1", "eval=none")
    train.run(job)
    options = Options(run=str(again / "run"), out=str(again / "out"), into="base")
    merging = Merging(compose([f"job={again}/run/job.yaml"]), options, print)
    with pytest.raises(UserError, match="hold quantised weights; use into=dequantised"):
        merging.report()


def test_in_lower_precision_what_is_lost_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, "method=lora", "rank=4")
    assert cli.main(["merge", f"run={tmp_path}/run", f"out={tmp_path}/merged", "dtype=bfloat16", "format=json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = report["targets"]["base"]
    assert found["noise"] > 1e-4
    assert found["lost"] <= found["worst"]["lost"] == max(found["modules"].values())
    with safe_open(tmp_path / "merged/model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    # in the very weights of the file, computed as the run computes
    assert far(logits(reloaded(tmp_path)), unmerged(tmp_path)) == pytest.approx(found["logits"], rel=2)
    assert 0 < found["logits"] < 0.1
    assert found["loss"] == pytest.approx(report["unmerged_loss"] + found["loss_rise"])
    assert found["kl"] >= 0


def test_the_share_is_one_where_nothing_is_left_of_the_update(tmp_path: Path) -> None:
    """An update far below bfloat16's last place is rounded away whole; one of a fiftieth of it nearly not at all."""
    trained(tmp_path, "method=lora", "rank=4")
    path = tmp_path / "llama/model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({n: t.bfloat16().float() for n, t in load_file(path).items()}, path, {"format": "pt"})
    more = ("dtype=bfloat16", "measure=false", "allow_drift=true")
    assert merged(tmp_path, *more, "scale=1e-7")["targets"]["base"]["lost"] == pytest.approx(1, abs=1e-3)
    shutil.rmtree(tmp_path / "merged")
    found = merged(tmp_path, *more, "scale=100")["targets"]["base"]
    assert abs(found["lost"]) < 1e-3
    assert found["noise"] < 1e-3


def test_scaled_to_nothing_it_is_the_base(tmp_path: Path) -> None:
    trained(tmp_path, "method=dora", "rank=4")
    merged(tmp_path, "scale=0", "measure=false")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32).eval()
    assert far(logits(reloaded(tmp_path)), logits(base)) < EXACT


def test_all_targets_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, "method=qlora", "rank=4")
    report = merged(tmp_path, "into=dequantised", "compare=true")
    assert set(report["targets"]) == {"base", "dequantised", "requantised"}
    found = report["targets"]
    assert found["dequantised"]["logits"] < EXACT
    assert found["dequantised"]["logits"] < found["requantised"]["logits"]
    assert found["requantised"]["lost"] > found["dequantised"]["lost"]
    assert found["requantised"]["noise"] > found["dequantised"]["noise"]
    said = capsys.readouterr().out
    assert "as trained" in said
    assert "rounding loses under 0.0001 % of the update" in said
    assert "  at scale 0.5 held-out loss" in "\n".join(told({**report, "out": "merged", "scale": 0.5}))
    assert "(written)" in next(line for line in said.splitlines() if "dequantised" in line)


def test_in_bfloat16_over_nf4(tmp_path: Path) -> None:
    """As most runs are: a bfloat16 base, every target loaded in the file's own dtype, bfloat16 sums on both sides."""
    trained(tmp_path, "method=qlora", "rank=4", "model.dtype=bfloat16")
    own = unmerged(tmp_path).float()
    for into in ("base", "dequantised", "requantised"):
        found = merged(tmp_path, f"into={into}")["targets"][into]
        model = reloaded(tmp_path, dtype="auto")
        assert model.dtype == torch.bfloat16
        assert far(logits(model).float(), own) < (0.05 if into == "dequantised" else 0.5)
        assert 0 < found["logits"] < 0.5
        assert found["noise"] > 0
        shutil.rmtree(tmp_path / "merged")


def test_tokens_that_the_job_added_are_there(tmp_path: Path) -> None:
    more = ["<a>", "<b>", *(f"<{i}>" for i in range(12))]
    trained(tmp_path, "method=lora", "rank=4", f"model.new_tokens=[{','.join(more)}]")
    merged(tmp_path, "measure=false")
    assert reloaded(tmp_path).config.vocab_size == 275
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("<b>") == 262
    assert far(logits(reloaded(tmp_path)), unmerged(tmp_path)) < EXACT


@pytest.mark.parametrize("method", ["lora", "dora", "full", "qlora", "qdora"])
def test_unmerged_in_memory_the_very_weights_are_back(method: str, tmp_path: Path) -> None:
    trained(tmp_path, f"method={method}")
    tuned = open_tuned(tmp_path / "run", compose([f"job={tmp_path}/run/job.yaml"]), cache_dir(), print)
    every = [*tuned.model.named_parameters(), *tuned.model.named_buffers()]
    own = {name: (t, t.data_ptr(), t.clone()) for name, t in every}
    for into, dtype in (("dequantised", torch.bfloat16), ("requantised", torch.float16)):
        if into == "dequantised" or method.startswith("q"):
            with Output(tuned, into, dtype).in_place():
                assert far(logits(tuned.model), torch.ones(1)) > 0
    assert {n for n, _ in (*tuned.model.named_parameters(), *tuned.model.named_buffers())} == own.keys()
    for name, t in (*tuned.model.named_parameters(), *tuned.model.named_buffers()):
        assert t is own[name][0], name
        assert t.data_ptr() == own[name][1], name
        assert torch.equal(t, own[name][2]), name


# what is refused


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("method=lora", ["into=requantised"], "only into=base"),
        ("method=qlora", [], "into=dequantised: the quantised weights that training saw"),
        ("method=houlsby", [], "method=houlsby: cannot be merged: "),
        ("method=prompt", [], "method=prompt: cannot be merged: its tokens stand in front of the input"),
        ("method=lora quant=int8", ["into=requantised"], "no checkpoint of int8 rows"),
        ("method=lora", ["gguf=q8_0"], "git clone https://github.com/ggml-org/llama.cpp"),
        ("method=lora", ["gguf=q9"], "gguf: the type 'q9' is unknown. Valid: "),
        ("method=qlora", ["gguf=f16", "into=requantised"], "llama.cpp reads plain weights"),
    ],
)
@pytest.mark.few(4)
def test_what_cannot_be_is_said_and_nothing_is_written(
    method: str, more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path, *method.split())
    capsys.readouterr()
    assert cli.main(["merge", f"run={tmp_path}/run", f"out={tmp_path}/merged", *more]) == 2
    assert said in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if "merged" in p.name]


def test_experts_are_not_quantised_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, "method=lora", "quant=nf4", "targets=attention", family="mixtral")
    assert cli.main(["merge", f"run={tmp_path}/run", f"out={tmp_path}/merged", "into=requantised"]) == 2
    assert "experts as one tensor" in capsys.readouterr().err
    own = unmerged(tmp_path)
    merged(tmp_path, "into=dequantised", "measure=false")
    assert far(logits(reloaded(tmp_path)), own) < EXACT


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, "method=lora")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/mine").write_text("mine")
    assert cli.main(["merge", f"run={tmp_path}/run", f"out={tmp_path}/merged"]) == 2
    assert "something is there already" in capsys.readouterr().err
    assert (tmp_path / "merged/mine").read_text() == "mine"
    assert cli.main(["merge", f"run={tmp_path}/run"]) == 2
    assert "out is missing" in capsys.readouterr().err


# llama.cpp's converter: called as its own help has it, with a stand-in where the real one is not


@pytest.mark.parametrize("fails", [False, True])
def test_the_converter_is_called_as_it_wants(
    fails: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path, "method=lora")
    (tmp_path / "llama.cpp").mkdir()
    end = "print('no such model', file=sys.stderr); sys.exit(1)" if fails else "open(a.outfile, 'w').write(a.outtype)"
    (tmp_path / "llama.cpp/convert_hf_to_gguf.py").write_text(
        "import argparse, os, sys\np = argparse.ArgumentParser()\np.add_argument('model')\n"
        "p.add_argument('--outfile')\np.add_argument('--outtype')\na = p.parse_args()\n"
        f"assert os.path.isfile(os.path.join(a.model, 'config.json'))\n{end}\n"
    )
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama.cpp"))
    code = cli.main(["merge", f"run={tmp_path}/run", f"out={tmp_path}/merged", "measure=false", "gguf=q8_0"])
    assert (tmp_path / "merged/model.safetensors").is_file()
    if fails:
        assert code == 2
        assert "no such model" in capsys.readouterr().err
        assert not [p for p in (tmp_path / "merged").iterdir() if "gguf" in p.name]
    else:
        assert code == 0
        assert (tmp_path / "merged/model-q8_0.gguf").read_text() == "q8_0"
    assert cli.main(["merge", f"run={tmp_path}/run", f"out={tmp_path}/o", "gguf=f16", f"llama_cpp={sys.prefix}"]) == 2
    assert "holds no convert_hf_to_gguf.py" in capsys.readouterr().err
