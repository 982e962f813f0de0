"""The card of a finished run: valid for the hub, true to the run, and each of its snippets does what it says."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from ftrun import cli
from ftrun.compose import compose
from ftrun.report.card import Facts, card, front_matter, shown
from ftrun.report.loading import VLLM_RANKS, vllm_trouble
from ftrun.runs import cache_dir
from ftrun.tasks import train
from ftrun.tasks.card import facts_of
from ftrun.tasks.tuned import open_tuned
from tests.jobs import tiny_job
from tests.methods.tuned import far, logits

RUN = ("steps=2", "lr=1e-2", "eval.retention=2", "eval.retention_tokens=8")


def trained(place: Path, *more: str) -> str:
    """A run in place/run; the text of its card."""
    train.run(tiny_job(place, *RUN, *more))
    return (place / "run/README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def carried_out(code: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What the snippet leaves, run where the card says; the base's folder is called by its name there."""
    monkeypatch.chdir(place)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "prompt"])
@pytest.mark.few(2)
def test_the_snippet_for_peft_gives_our_logits(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = trained(tmp_path, f"method={method}", *([] if method == "prompt" else ["rank=4"]))
    code = next(b for b in blocks(text, "python") if "PeftModel" in b)
    (tmp_path / "run/llama").symlink_to(tmp_path / "llama")
    names = carried_out(code, tmp_path / "run", monkeypatch)
    tuned = open_tuned(
        tmp_path / "run", compose([f"job={tmp_path}/run/job.yaml", "kernels=reference"]), cache_dir(), print
    )
    if method == "prompt":
        assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]
    else:
        # bitsandbytes' CPU kernel multiplies in bfloat16
        assert far(logits(names["model"]), logits(tuned.model)) < (5e-2 if method == "qlora" else 1e-5)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_snippet_for_transformers_runs_on_what_the_command_makes(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = trained(tmp_path, f"method={method}")
    code = next(b for b in blocks(text, "python") if "PeftModel" not in b)
    monkeypatch.chdir(tmp_path)
    if method != "full":
        command = next(b for b in blocks(text, "bash") if "ftrun merge" in b)
        assert cli.main([*command.split()[1:], "measure=false"]) == 0
    names = carried_out(code, tmp_path / ("run" if method == "full" else ""), monkeypatch)
    tuned = open_tuned(
        tmp_path / "run", compose([f"job={tmp_path}/run/job.yaml", "kernels=reference"]), cache_dir(), print
    )
    assert far(logits(names["model"]), logits(tuned.model)) < 1e-5
    assert names["model"].dtype == torch.float32


def test_the_hub_reads_it_and_it_is_true(tmp_path: Path) -> None:
    text = trained(tmp_path, "method=qlora", "rank=4")
    result = json.loads((tmp_path / "run/result.json").read_text())
    read = ModelCard(text)
    read_back = read.data.to_dict()
    assert read_back["library_name"] == "peft"
    assert read_back["tags"] == ["ftrun", "lora", "nf4"]
    assert "base_model" not in read_back  # a folder of this machine is nothing that the hub knows
    after, before = result["eval"]["after"]["loss"], result["eval"]["before"]["loss"]
    assert f"| {before:.4f} | {after:.4f} |" in text
    assert f"{result['retention']['after']:.4f}" in text
    assert f"{result['effective_rank']['mean']:.1f} on average" in text
    assert "planned" in text
    assert result["base"]["hash"] in text
    assert "ftrun job=job.yaml" in text
    assert str(tmp_path) not in text
    assert "`llama`" in text


def facts(**changes: object) -> Facts:
    """Those of a run over a base of the hub; `changes` are base=…, or keys of the job."""
    base = {"source": "hub", "path": "org/base", "revision": "abc", "hash": "0" * 64, "license": "mit", "package": None}
    base |= {"dtype": "bfloat16", "stored_as": None, "quantisation": "none", **changes.pop("base", {})}  # type: ignore[dict-item]
    job = {
        "choices": {"method": "lora"},
        "model": {"path": "org/base"},
        "method": {"kind": "lora", "rank": 8},
        "quant": {"kind": "none"},
        "data": {"kind": "hub", "path": "org/rows", "loss_on": "assistant"},
        "optim": {"kind": "adamw"},
        "lr": 1e-4,
        "batch": 4,
        "seq_len": 64,
        "seed": 0,
        **changes,
    }
    result = {"base": base, "steps": 3, "tokens": 9, "trainable_params": 1, "total_params": 2, "eval": {}}
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "use_dora": False}
    return Facts(job, result, config, "adapter", "run")


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("apache-2.0", {"license": "apache-2.0"}),
        ("llama (research only)", {"license": "other", "license_name": "llama (research only)"}),
        (None, {}),
    ],
)
def test_the_licence_is_the_bases(licence: str | None, said: dict) -> None:
    made = facts(base={"license": licence})
    found = front_matter(made)
    assert {k: v for k, v in found.items() if k.startswith("license")} == said
    assert found["base_model"] == "org/base"
    assert found["datasets"] == ["org/rows"]
    text = card(made)
    assert yaml.safe_load(text.split("---")[1]) == found
    assert 'revision="abc"' in text
    assert (licence or "not on record") in text


def test_places_are_not_told() -> None:
    assert shown("/home/me/models/base") == "base"
    assert shown("~/models/base") == "base"
    assert shown("models/base") == "models/base"
    text = card(facts(base={"source": "folder", "path": "/home/me/base"}, model={"path": "/home/me/base"}))
    assert "/home/me" not in text
    text = card(facts(data={"kind": "jsonl", "path": "/home/me/rows.jsonl"}))
    assert "/home/me" not in text


# vLLM is not here: the rules of its loader, on configs and on the names in our file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"r": 512}, None),
        ({"r": 513}, "ranks up to 512"),
        ({"use_dora": True}, "does not load DoRA"),
        ({"modules_to_save": ["lm_head"]}, "no modules_to_save"),
        ({"bias": "all"}, "no biases"),
        ({"rank_pattern": {"q_proj": 4}}, "one rank"),
        ({"alpha_pattern": {"q_proj": 4}}, "one rank"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "updates of experts"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "the embedding and the head"),
        ({"peft_type": "PROMPT_TUNING"}, "loads LoRA alone"),
    ],
)
def test_the_rules_of_vllm(change: dict, said: str | None) -> None:
    found = vllm_trouble({**facts().config, **change})
    assert found is None if said is None else found is not None and said in found


def test_what_vllm_would_load(tmp_path: Path) -> None:
    """The names that its parser takes, and targets by their last names alone, as it matches them."""
    from safetensors import safe_open

    text = trained(tmp_path, "method=lora", "rank=24")
    made = facts_of(tmp_path / "run")
    assert vllm_trouble(made.config) is None
    command = next(b for b in blocks(text, "bash") if "vllm serve" in b)
    assert "--max-lora-rank 32" in command
    assert 32 in VLLM_RANKS
    assert "--lora-modules run=adapter" in command
    assert all("." not in name for name in made.config["target_modules"])
    with safe_open(tmp_path / "run/adapter/adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert re.fullmatch(r"base_model\.model\.[\w.]+\.lora_[AB]\.weight", name), name
    assert not {"modules_to_save", "use_dora"} & {k for k, v in made.config.items() if v}


def test_where_vllm_does_not_load_it_the_card_says_so(tmp_path: Path) -> None:
    text = trained(tmp_path, "method=dora", "rank=4")
    assert "vLLM does not load this adapter: it does not load DoRA" in text
    assert "vllm serve merged" in text
    assert "--enable-lora" not in text
