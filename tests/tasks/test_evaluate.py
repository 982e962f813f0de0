"""`ftrun eval` on whole runs of a tiny model, each figure against an independent computation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ftrun import assemble
from ftrun.cli import main
from ftrun.compose import compose
from ftrun.runs import cache_dir
from ftrun.tasks import train as task
from tests.jobs import tiny_job

SMALL = ("eval.retention=4", "eval.retention_tokens=8", "eval.exact_rows=3", "eval.exact_tokens=8")
HARD = ("rank=4", "steps=8", "lr=2e-2", "optim.schedule=constant", "data.held_out=6", *SMALL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs: lora, qlora (its base in 4 bits), full and prompt."""
    path = tmp_path_factory.mktemp("runs")
    for method in ("lora", "qlora", "full", "prompt"):
        more = [one for one in HARD if method in ("lora", "qlora") or not one.startswith("rank")]
        assert task.run(tiny_job(path, f"method={method}", *more, f"out={path / method}")) == 0
    return path


def evaluated(capsys: pytest.CaptureFixture[str], run: Path, *more: str) -> dict[str, Any]:
    """The JSON on standard output, which is what the folder's eval.json holds."""
    capsys.readouterr()
    assert main(["eval", f"run={run}", "format=json", *more]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    assert json.loads((run / "eval.json").read_text()) == found
    return found


def rows_of(run: Path) -> list[tuple[list[int], list[int]]]:
    """The held-out rows' tokens, and which are learnt."""
    job = compose([f"job={run}/job.yaml"])
    parts = assemble.sketch(job, cache_dir(), lambda text: None)
    held = assemble.rows(job, parts, cache_dir(), lambda text: None).held_out
    return [(held.ids(i).tolist(), held.learn(i).tolist()) for i in range(len(held))]


def learnt_logits(model: Any, rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row, unpadded, by the model's own forward: (N, V) float64, and the tokens that were to be told (N,)."""
    found, tokens = [], []
    for ids, learn in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        places = [i for i in range(1, len(ids)) if learn[i]]
        found.append(logits[[i - 1 for i in places]])
        tokens += [ids[i] for i in places]
    return torch.cat(found), torch.tensor(tokens)


def theirs(path: Path, run: Path | None) -> Any:
    """transformers' own model, with PEFT's adapter where a run is given."""
    base = AutoModelForCausalLM.from_pretrained(path / "llama", dtype=torch.float32)
    return (base if run is None else PeftModel.from_pretrained(base, run / "adapter")).eval()


def test_loss_perplexity_agreement_and_kl_are_transformers_and_pefts(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, rows = evaluated(capsys, runs / "lora"), rows_of(runs / "lora")
    base, tokens = learnt_logits(theirs(runs, None), rows)
    tuned, _ = learnt_logits(theirs(runs, runs / "lora"), rows)
    for when, logits in (("before", base), ("after", tuned)):
        loss = float(F.cross_entropy(logits, tokens))
        assert found["held_out"][when] == {
            "loss": pytest.approx(loss, rel=1e-5),
            "perplexity": pytest.approx(math.exp(loss), rel=1e-4),
            "tokens": len(tokens),
        }
    assert found["held_out"]["after"]["loss"] < found["held_out"]["before"]["loss"] - 0.1
    p, q = (torch.distributions.Categorical(logits=logits) for logits in (base, tuned))
    assert found["agreement"] == {
        "tokens": len(tokens),
        "agreement": pytest.approx(float((base.argmax(-1) == tuned.argmax(-1)).double().mean())),
        "kl": pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()), rel=1e-4),
        "kl_reverse": pytest.approx(float(torch.distributions.kl_divergence(q, p).mean()), rel=1e-4),
    }
    assert found["agreement"]["kl"] > 0.05
    assert found["rows"] == 6
    assert found["drifts"] == []


def test_retention_and_rank_are_what_training_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("lora", "qlora", "full"):
        found = evaluated(capsys, runs / method, "eval.exact=none", "eval.drop=false")
        told = json.loads((runs / method / "result.json").read_text())
        assert found["retention"] == pytest.approx(told["retention"], abs=1e-5)
        assert found["effective_rank"] == told["effective_rank"]
        for when in ("before", "after"):
            assert found["held_out"][when] == pytest.approx(told["eval"][when], rel=1e-5)
        assert found["drop"] is None
    assert found["agreement"]["kl"] > 0  # of method=full, whose base is a second model


def test_virtual_tokens_are_the_tuned_models_alone(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, plain = evaluated(capsys, runs / "prompt"), evaluated(capsys, runs / "lora")
    assert found["held_out"]["before"] == pytest.approx(plain["held_out"]["before"], rel=1e-5)
    told = json.loads((runs / "prompt" / "result.json").read_text())
    assert found["held_out"]["after"] == pytest.approx(told["eval"]["after"], rel=1e-5)
    assert found["agreement"]["tokens"] == plain["agreement"]["tokens"]


def test_a_scale_is_so_much_of_the_update(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = evaluated(capsys, runs / "lora")
    found = evaluated(capsys, runs / "lora", "scale=[0,0.5,1]")["scales"]
    assert [row["scale"] for row in found] == [0, 0.5, 1]
    for row, when in ((found[0], "before"), (found[2], "after")):
        assert row["loss"] == pytest.approx(whole["held_out"][when]["loss"], abs=1e-7)
        assert row["exact"] == whole["exact"][when]["share"]
    assert found[0]["rise"] == 0
    assert found[2]["retention"] == whole["retention"]["after"]
    half = theirs(runs, runs / "lora")
    for module in half.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: value / 2 for name, value in module.scaling.items()}
    logits, tokens = learnt_logits(half, rows_of(runs / "lora"))
    assert found[1]["loss"] == pytest.approx(float(F.cross_entropy(logits, tokens)), rel=1e-5)
    alone = evaluated(capsys, runs / "lora", "scale=0.5", "eval.exact=none")
    assert alone["held_out"]["after"]["loss"] == pytest.approx(found[1]["loss"], abs=1e-7)
    for method in ("full", "prompt"):
        assert main(["eval", f"run={runs / method}", "scale=0.5"]) == 2
        assert f"scale=0.5: method={method}" in capsys.readouterr().err


def test_kinds_of_evaluation_stand_side_by_side(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("eval.retention=0", "eval.exact=none", "eval.rows=2")
    first = evaluated(capsys, runs / "lora", "eval.retention=0", "eval.exact=none")
    both = evaluated(capsys, runs / "lora", "scale=[0,1]", *few)
    assert both["held_out"] == first["held_out"]
    assert both["rows"] == 2
    settings = both["settings"]
    assert settings["held_out"] == first["settings"]["held_out"]
    assert (settings["held_out"]["scale"], settings["held_out"]["rows"]) == (1.0, 6)
    assert (settings["scales"]["scale"], settings["scales"]["eval"]["rows"]) == ([0, 1], 2)
    other = {**both, "settings": {"held_out": {**settings["held_out"], "learnt": {"a": "b"}}, "scales": 1}}
    (runs / "lora/eval.json").write_text(json.dumps(other))  # of the weights before the run went on
    alone = evaluated(capsys, runs / "lora", "scale=[0,1]", *few)
    assert "held_out" not in alone
    assert set(alone["settings"]) == {"scales"}


def test_figures_that_cannot_be_kept_are_told(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["eval", f"run={runs / 'lora'}", "eval.retention=0", "eval.exact=none"]
    (tmp_path / "file").write_text("")
    assert main([*line, f"out={tmp_path}/file/figures.json"]) == 2
    assert "is a file; name another out" in capsys.readouterr().err
    assert main([*line, f"out={tmp_path}/{'x' * 250}.json"]) == 2  # seen only when it is written
    said = capsys.readouterr()
    assert "held-out loss" in said.out
    assert "File name too long" in said.err
    assert (runs / "lora/eval.json").is_file()
    (runs / "lora/eval.json").write_text("[1]")
    assert main(line) == 2
    assert "eval.json: damaged: expected a JSON object, found list" in capsys.readouterr().err
    (runs / "lora/eval.json").unlink()


def test_the_drop_of_a_quantisation(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(capsys, runs / "qlora")["drop"]
    rows = rows_of(runs / "qlora")
    base, tokens = learnt_logits(theirs(runs, None), rows)
    over_base, _ = learnt_logits(theirs(runs, runs / "qlora"), rows)
    dense, adapted = quantised(runs, None), quantised(runs, runs / "qlora")
    four = {"base": base, "tuned_on_base": over_base}
    four |= {"quantised_base": learnt_logits(dense, rows)[0], "tuned_quantised": learnt_logits(adapted, rows)[0]}
    digits = torch.tensor([letter_of(int(i)).isdigit() for i in tokens])
    assert found["tokens"]["numbers"] == int(digits.sum()) > 0
    assert sum(found["tokens"].values()) == len(tokens)
    for name, logits in four.items():
        losses = F.cross_entropy(logits, tokens, reduction="none")
        assert found[name]["loss"] == pytest.approx(float(losses.mean()), rel=1e-4), name
        assert found[name]["numbers"] == pytest.approx(float(losses[digits].mean()), rel=1e-4), name
        same = float((logits.argmax(-1) == base.argmax(-1)).double().mean())
        assert found[name]["agreement"] == pytest.approx(same, abs=0.011), name
    assert found["drop"]["base"] == found["quantised_base"]["loss"] - found["base"]["loss"] != 0
    assert found["drop"]["tuned"] == found["tuned_quantised"]["loss"] - found["tuned_on_base"]["loss"] != 0


def letter_of(token: int) -> str:
    from tests.families import tiny_tokenizer

    return tiny_tokenizer().convert_ids_to_tokens(token)[:1]


def quantised(path: Path, run: Path | None) -> Any:
    """transformers' model with each linear layer but the head's weight through bitsandbytes' NF4 and back."""
    from bitsandbytes import functional as bnb

    base = theirs(path, None)
    job = compose([f"job={path}/qlora/job.yaml"])
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            weight = module.weight.data.to(torch.float32)
            packed, state = bnb.quantize_4bit(
                weight,
                blocksize=job.quant.options.block_size,
                compress_statistics=job.quant.options.double_quant,
                quant_type="nf4",
            )
            module.weight.data = bnb.dequantize_4bit(packed, state).to(torch.float32)
    return base if run is None else PeftModel.from_pretrained(base, run / "adapter").eval()


def test_a_held_out_text_of_a_file(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "the cat, the moon and the sun. " * 20
    (tmp_path / "held out.txt").write_text(text)
    found = evaluated(capsys, runs / "lora", f"eval.retention_path={tmp_path}/held out.txt", "eval.exact=none")
    ids = [ord(c) for c in text]
    assert found["retention_text"]["tokens"] == len(ids)
    rows = text_tokens(text, 127)
    for when, run in (("before", None), ("after", runs / "lora")):
        logits, tokens = learnt_logits(theirs(runs, run), rows)
        assert found["retention_text"][when] == pytest.approx(float(F.cross_entropy(logits, tokens)), rel=1e-5)


def text_tokens(text: str, room: int) -> list[tuple[list[int], list[int]]]:
    """Rows of a text, each behind <s>."""
    from tests.families import tiny_tokenizer

    ids = tiny_tokenizer()(text, add_special_tokens=False).input_ids
    rows = [[1, *ids[i : i + room]] for i in range(0, len(ids), room)]
    return [(row, [0] + [1] * (len(row) - 1)) for row in rows]


def test_what_eval_asks_for_is_measured_at_the_end_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tiny_job(tmp_path, "method=lora", *HARD[:3], "eval=all", *SMALL)
    assert task.run(job) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "run/eval.json").read_text())
    told = json.loads((tmp_path / "run/result.json").read_text())
    assert found["held_out"]["after"] == pytest.approx(told["eval"]["after"], rel=1e-5)
    assert found["agreement"]["kl"] > 0
    assert found["exact"]["after"]["rows"] == 3
    assert "KL(base ‖ tuned)" in said
    assert "drop: not measured: quant=none" in said
    assert task.run(job) == 0
    assert "Nothing to do" in capsys.readouterr().out
    for name in ("eval.json", "README.md"):  # as if killed at the very end
        (tmp_path / "run" / name).unlink()
    assert task.run(job) == 0
    said = capsys.readouterr().out
    assert "finished, 8 steps" in said
    assert "Left to do: its card, its evaluation" in said
    assert "KL(base ‖ tuned)" in said
    assert json.loads((tmp_path / "run/eval.json").read_text()) == found
    assert (tmp_path / "run/README.md").is_file()
    assert task.run(tiny_job(tmp_path, "method=lora", *HARD[:3], f"out={tmp_path / 'plain'}")) == 0
    assert not (tmp_path / "plain/eval.json").exists()


def test_mistakes_are_told(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = f"run={runs / 'lora'}"
    for words, told in (
        ((), "run is missing"),
        ((f"run={tmp_path}/none",), "no such folder"),
        ((run, "scale=[]"), "scale=[]: expected a number"),
        ((run, "scale=half"), "scale=half: expected"),
        ((run, "scale=-1"), "scale=-1: expected"),
        ((run, "eval.exact=regex"), "eval.exact=regex: needs eval.pattern"),
        ((run, r"eval.pattern=(\d+"), "has no effect with eval.exact=null"),
        ((run, "eval.exact=regex", r"eval.pattern=(\d+"), "is no regular expression"),
        ((run, "eval.exact=json"), "eval.exact=json: no held-out answer"),
        ((run, "eval.retention_path=none.txt"), "eval.retention_path=none.txt: no such file"),
        ((run, "tasks=arc_easy"), "tasks=arc_easy: has no effect with eval=held_out; use eval=lm_eval"),
    ):
        assert main(["eval", *words]) == 2, words
        assert told in capsys.readouterr().err, words
    job = tiny_job(tmp_path, "method=lora", "steps=1", "data.held_out=0")
    assert task.run(job) == 0
    assert main(["eval", f"run={tmp_path}/run"]) == 2
    assert "holds no row out" in capsys.readouterr().err


def test_the_table_names_what_was_measured(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", f"run={runs / 'qlora'}", "eval.exact=regex", r"eval.pattern=(\w+) \d+"]) == 0
    said = capsys.readouterr().out
    for words in ("held-out loss", "perplexity", "exact match (regex, 3 rows)", "base, quantised", "effective rank"):
        assert words in said
    assert json.loads((runs / "qlora/eval.json").read_text())["exact"]["pattern"] == r"(\w+) \d+"


def test_a_drift_that_is_allowed_is_on_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    for method in ("lora", "full"):
        job = tiny_job(tmp_path, f"method={method}", "steps=1", *SMALL, f"out={tmp_path / method}")
        assert task.run(job) == 0
    file = tmp_path / "llama/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    for method in ("lora", "full"):
        assert main(["eval", f"run={tmp_path / method}"]) == 2
        assert "allow_drift=true" in capsys.readouterr().err
        found = evaluated(capsys, tmp_path / method, "allow_drift=true", "eval.exact=none")
        assert "model.norm.weight" in found["drifts"][0]
