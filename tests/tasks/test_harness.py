"""eval=lm_eval: a local task through the harness, where it is installed; its absence told where it is not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from ftrun.cli import main
from ftrun.tasks import train as task
from tests.jobs import WORDS, tiny_job

installed = importlib.util.find_spec("lm_eval") is not None
TASK = """
task: ftrun_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""
ROWS = [{"question": f"{w}:", "choices": [WORDS[i - 1], w], "label": i % 2} for i, w in enumerate(WORDS)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    assert task.run(tiny_job(tmp_path, "method=qlora", "rank=4", "steps=6", "lr=5e-2", "eval=none")) == 0
    return tmp_path / "run"


@pytest.mark.skipif(not installed, reason="lm_eval is not installed: pip install 'ftrun[lm_eval]'")
def test_a_task_of_ones_own(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "words.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/ftrun_words.yaml").write_text(TASK.format(file=file))
    words = [f"run={run}", "eval=lm_eval", f"eval.include_path={tmp_path}/tasks", "format=json"]
    capsys.readouterr()
    assert main(["eval", *words, "tasks=ftrun_words", "scale=[0,1]"]) == 0
    found = json.loads(capsys.readouterr().out)
    models = found["lm_eval"]["models"]
    assert list(models) == ["base", "base, quantised", "tuned at scale 0", "tuned"]
    assert models["base"]["ftrun_words"]["acc"] == by_hand(tmp_path / "llama")
    assert models["tuned at scale 0"] == models["base, quantised"]
    assert json.loads((run / "eval.json").read_text()) == found
    assert main(["eval", *words[:3], "tasks=ftrun_words"]) == 0
    assert "ftrun_words acc" in capsys.readouterr().out
    assert main(["eval", *words, "tasks=ftrun_wordz"]) == 2
    assert "Did you mean 'ftrun_words'?" in capsys.readouterr().err
    assert main(["eval", *words]) == 2
    assert "names no task" in capsys.readouterr().err


def by_hand(folder: Path) -> float:
    """The share of rows whose right choice is the likelier, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in ROWS:
        sums = []
        for choice in row["choices"]:
            before = tokenizer(row["question"]).input_ids
            ids = before + tokenizer(f" {choice}", add_special_tokens=False).input_ids
            with torch.no_grad():
                told = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(told[i - 1, ids[i]]) for i in range(len(before), len(ids))))
        right += (sums[1] > sums[0]) == (row["label"] == 1)
    return right / len(ROWS)


@pytest.mark.skipif(installed, reason="lm_eval is installed")
def test_its_absence_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", f"run={run}", "eval=lm_eval", "tasks=arc_easy"]) == 2
    assert "pip install 'ftrun[lm_eval]'" in capsys.readouterr().err
