"""`ftrun generate`: a run's answers and its base's, files of prompts, a conversation, several adapters, blends."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftrun.cli import main
from ftrun.evals import generation
from ftrun.methods.files import hashes
from ftrun.train.interrupt import Terminated
from tests.jobs import overrides, tiny_base, write_rows

_NEW = 12
Runs = dict[str, Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Finished runs of one step: two of lora, others on the same base."""
    folder = tmp_path_factory.mktemp("generate")
    base, rows = tiny_base(folder / "llama"), write_rows(folder / "rows.jsonl")
    jobs = {
        "a": ("method=lora", "rank=4"),
        "b": ("method=lora", "rank=3", "targets=qv", "alpha=9", "data.system=Be brief."),
        "c": ("method=houlsby", "method.bottleneck=8"),
        "d": ("method=prompt", "method.tokens=4"),
        "e": ("method=full",),
        "f": ("method=lora", "rank=2", "data.template=plain"),
    }
    for name, more in jobs.items():
        line = overrides(base, rows, *more, "steps=1", "lr=0.05", "eval=none", f"out={folder / name}")
        assert main(line) == 0
    return {**{name: folder / name for name in jobs}, "base": base}


def asked(capsys: pytest.CaptureFixture[str], *line: str, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["generate", *line, f"max_new_tokens={_NEW}"]) == code
    out = capsys.readouterr()
    return out.out, out.err


def objects(capsys: pytest.CaptureFixture[str], *line: str) -> Any:
    return json.loads(asked(capsys, *line, "format=json")[0])


def referee(runs: Runs, adapter: Path | None, prompt: str, system: str = "") -> str:
    """What transformers and PEFT answer."""
    model: Any = AutoModelForCausalLM.from_pretrained(runs["base"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(runs["base"])
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW, do_sample=False, eos_token_id=4
    )
    new = out[0] if out.shape[1] <= _NEW else out[0, ids.shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).rstrip("\ufffd").strip()


def test_a_prompts_two_answers_are_the_referees(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    found = objects(capsys, f"run={runs['a']}", "prompt=Tom's 3 apples, he said: how many?")
    assert found["prompt"] == "Tom's 3 apples, he said: how many?"
    said = {name: one["answer"] for name, one in found["answers"].items()}
    assert list(said) == ["tuned", "base"]
    assert said["base"] == referee(runs, None, found["prompt"])
    assert said["tuned"] == referee(runs, runs["a"] / "adapter", found["prompt"])
    assert said["tuned"] != said["base"]
    text, _ = asked(capsys, f"run={runs['a']}", f"prompt={found['prompt']}")
    assert [" ".join(block.split()) for block in text.split("base   ")] == [
        " ".join(f"tuned {said['tuned']}".split()),
        " ".join(said["base"].split()),
    ]


def test_scale_takes_so_much_of_the_update(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    line = (f"run={runs['a']}", "prompt=nine cats?")
    none = objects(capsys, *line, "scale=0")["answers"]
    assert none["tuned"] == none["base"]
    assert "base" not in objects(capsys, *line, "base=false")["answers"]
    assert "only 1 is possible" in asked(capsys, f"run={runs['e']}", "prompt=x", "scale=0.5", code=2)[1]


def test_a_run_of_every_kind_answers(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    base = objects(capsys, f"run={runs['a']}", "prompt=nine?")["answers"]["base"]
    for name in "cde":
        found = objects(capsys, f"run={runs[name]}", "prompt=nine?")["answers"]
        assert found["base"] == base
        assert found["tuned"] != base


def test_a_file_of_prompts_is_answered_in_its_order(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["nine?", "seven red cats and a dog?", "up", "sun and moon?", "a"]
    (tmp_path / "asked.txt").write_text("\n".join(prompts) + "\n\n", encoding="utf-8")
    out = tmp_path / "answered.jsonl"
    line = (f"run={runs['a']}", f"prompts={tmp_path / 'asked.txt'}", "batch_rows=2", f"out={out}")
    asked(capsys, *line)
    rows = [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert [row["answer"] for row in rows] == [referee(runs, runs["a"] / "adapter", prompt) for prompt in prompts]
    assert "is there already" in asked(capsys, *line, code=2)[1]
    drawn = objects(capsys, *line[:2], "temperature=1.5", "batch_rows=1", "base=true", "seed=3")["answers"]
    assert drawn == objects(capsys, *line[:2], "temperature=1.5", "batch_rows=5", "base=true", "seed=3")["answers"]
    assert drawn != objects(capsys, *line[:2], "temperature=1.5", "batch_rows=5", "base=true", "seed=4")["answers"]
    assert all(row["base"] for row in drawn)


def test_each_prompt_names_its_adapter(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": i, "prompt": f"{i} cats?", "adapter": name} for i, name in enumerate(["x", "y", "base", "z", "y"])]
    rows[4] = {"messages": [{"role": "user", "content": "4 cats?"}], "adapter": "y"}
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    adapters = f"adapters={{x: {runs['a']}, y: {runs['b']}, z: {runs['c']}}}"
    found = objects(capsys, adapters, f"prompts={file}")["answers"]
    assert [row["adapter"] for row in found] == ["x", "y", "base", "z", "y"]
    assert [row.get("id") for row in found] == [0, 1, 2, 3, None]
    assert found[0]["answer"] == referee(runs, runs["a"] / "adapter", "0 cats?")
    assert found[1]["answer"] == referee(runs, runs["b"] / "adapter", "1 cats?", "Be brief.")
    assert found[2]["answer"] == referee(runs, None, "2 cats?")
    assert found[4]["answer"] == referee(runs, runs["b"] / "adapter", "4 cats?", "Be brief.")
    alone = objects(capsys, f"run={runs['c']}", "prompt=3 cats?")["answers"]["tuned"]
    assert found[3]["answer"] == alone["answer"]
    every = objects(capsys, adapters, "prompt=3 cats?")["answers"]
    assert list(every) == ["x", "y", "z", "base"]
    assert every["z"] == alone
    file.write_text('{"prompt": "a", "adapter": "w"}\n', encoding="utf-8")
    said = asked(capsys, adapters, f"prompts={file}", code=2)[1]
    assert f"{file}:1: the adapter 'w' is unknown" in said
    file.write_text('{"prompt": "a"}\n', encoding="utf-8")
    assert "names no adapter" in asked(capsys, adapters, f"prompts={file}", code=2)[1]


def test_a_blend_answers_and_is_saved_for_peft(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "blended"
    line = (f"adapters={{x: {runs['a']}, y: {runs['b']}}}", "blend={x: 0.7, y: 0.3}", f"out={out}")
    made, said = asked(capsys, *line, "format=json")
    assert json.loads(made)["rank"] == 7
    assert "rank 7, 100.00% of the update" in said
    found = objects(capsys, *line[:2], "prompt=nine?")["answers"]
    assert found["blend"]["answer"] == referee(runs, out / "adapter", "nine?")
    assert found["blend"] != found["base"]
    record = json.loads((out / "adapter/provenance.json").read_text(encoding="utf-8"))
    assert record["blend"]["weights"] == {"x": 0.7, "y": 0.3}
    assert record["blend"]["adapters"]["y"]["files"] == hashes(runs["b"] / "adapter")
    assert record["base"]["hash"]
    assert "rank 2, " in asked(capsys, *line[:2], "blend_rank=2", "prompt=nine?")[1]
    assert "is there already" in asked(capsys, *line, code=2)[1]
    again = objects(capsys, f"run={out}", "prompt=nine?")["answers"]
    assert again == {"tuned": found["blend"], "base": found["base"]}
    assert main(["check", f"run={out}"]) == 0
    capsys.readouterr()
    assert main([f"job={out}/job.yaml", f"out={out}"]) == 0  # nothing trains over it
    assert "finished, 0 steps" in (told := capsys.readouterr().out)
    assert "Nothing to do" in told
    assert main(["push", f"run={out}", "repo=me/mine", "dry=true"]) == 2
    assert "a blend of adapters has no training" in capsys.readouterr().err
    assert json.loads((out / "result.json").read_text())["blend"] == record["blend"]
    own, of = (yaml.safe_load((folder / "job.yaml").read_text()) for folder in (out, runs["a"]))
    assert {key for key in own if own[key] != of[key]} == {"method", "rank", "alpha", "targets", "out"}
    assert main(["merge", f"run={out}", f"out={tmp_path / 'merged'}", "measure=false"]) == 0
    assert referee({"base": tmp_path / "merged"}, None, "nine?") == found["blend"]["answer"]
    capsys.readouterr()
    assert main(["eval", f"run={out}", "eval=all", "eval.retention=0", "eval.exact=none", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["agreement"]["kl"] > 0
    refused = asked(capsys, f"adapters={{x: {runs['a']}, z: {runs['c']}}}", "blend={x: 1, z: 1}", "prompt=a", code=2)[1]
    assert "z is of method=houlsby" in refused


def test_answers_that_cannot_be_written_are_not_lost(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "asked.txt").write_text("nine?\nup\n", encoding="utf-8")
    rows = tmp_path / "asked.jsonl"
    rows.write_text('{"prompt": "nine?", "id": "\\ud800"}\n')  # no file of UTF-8 takes the half of a pair
    answered = asked(capsys, f"run={runs['a']}", f"prompts={rows}", f"out={tmp_path / 'odd.jsonl'}")
    assert answered[0] == ""
    assert json.loads((tmp_path / "odd.jsonl").read_text())["id"] == "\ud800"
    rows.write_text('{"prompt": "\\ud800"}\n')
    said = asked(capsys, f"run={runs['a']}", f"prompts={rows}", code=2)[1]
    assert said == f"ftrun: {rows}:1: holds half a surrogate pair, which is no text\n"
    line = (f"run={runs['a']}", f"prompts={tmp_path / 'asked.txt'}")
    blend = (f"adapters={{x: {runs['a']}, y: {runs['b']}}}", "blend={x: 1, y: 1}")
    for words in (line, blend):  # told before a model is opened
        said = asked(capsys, *words, f"out={tmp_path / 'asked.txt' / 'x.jsonl'}", code=2)[1]
        assert said == f"ftrun: out={tmp_path}/asked.txt/x.jsonl: {tmp_path}/asked.txt is a file; name another out\n"
    long = tmp_path / ("x" * 250 + ".jsonl")  # seen only when it is written
    out, said = asked(capsys, *line, f"out={long}", code=2)
    assert [json.loads(text)["prompt"] for text in out.splitlines()] == ["nine?", "up"]
    assert "File name too long; the answers are on standard output" in said
    assert "cannot be written: File name too long" in asked(capsys, *blend, f"out={tmp_path / ('x' * 256)}", code=2)[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked.jsonl", "asked.txt", "odd.jsonl"]


def test_an_allowed_drift_is_on_record(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs["a"], other)
    note = other / "adapter/provenance.json"
    facts = json.loads(note.read_text(encoding="utf-8"))
    note.write_text(json.dumps({**facts, "template": "f" * 64}), encoding="utf-8")
    adapters, out = f"adapters={{x: {other}, y: {runs['b']}}}", tmp_path / "blended"
    asked(capsys, adapters, "blend={x: 1, y: 1}", f"out={out}", "allow_drift=true")
    of = json.loads((out / "result.json").read_text(encoding="utf-8"))["blend"]["adapters"]
    assert [text.partition(":")[0] for text in of["x"]["drifts"]] == ["template"]
    assert "drifts" not in of["y"]
    assert main(["merge", f"run={other}", f"out={tmp_path / 'merged'}", "measure=false", "allow_drift=true"]) == 0
    assert json.loads((tmp_path / "merged/merge.json").read_text())["drifts"] == of["x"]["drifts"]
    again = [f"job={other}/job.yaml", f"method.from={other}/adapter", f"out={tmp_path / 'again'}", "allow_drift=true"]
    assert main(again) == 0
    assert json.loads((tmp_path / "again/adapter/provenance.json").read_text())["drifts"] == of["x"]["drifts"]


def test_a_conversation_remembers_until_it_is_reset(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def talked(*lines: str) -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{line}\n" for line in lines)))
        out, said = asked(capsys, f"run={runs['a']}", "raw=true")
        return [part.strip() for part in out.split("> ")[1:]], said

    first, said = talked("nine?", "and?", "/reset", "nine?", "/what", "/exit", "never read")
    assert "/what: no such command" in said
    assert first[0] == first[3]
    assert talked("and?")[0][0] != first[1]
    assert talked(f"nine?{first[0]}and?")[0][0] == first[1]
    for word in ("base=true", "format=json"):
        said = asked(capsys, f"run={runs['a']}", word, code=2)[1]
        assert f"{word}: has no effect in a conversation" in said


@pytest.mark.parametrize("how", [KeyboardInterrupt, Terminated])
def test_an_interrupted_answer_is_not_the_end_of_a_conversation_and_a_request_to_end_is(
    how: type[KeyboardInterrupt], runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    own, calls = generation.pieces, list[int]()

    def pieces(*given: Any, **more: Any) -> Iterator[str]:
        calls.append(1)
        for number, piece in enumerate(own(*given, **more)):
            yield piece
            if len(calls) == 2 and number == 0:
                raise how

    monkeypatch.setattr(generation, "pieces", pieces)
    monkeypatch.setattr(sys, "stdin", Terminal("nine?\nand?\nand?\n"))
    if how is Terminated:
        asked(capsys, f"run={runs['a']}", "raw=true", code=130)
        return
    out, said = asked(capsys, f"run={runs['a']}", "raw=true")
    answers = [part.strip() for part in out.split("> ")[1:]]
    assert "stopped: the question and what there is of its answer are forgotten" in said
    monkeypatch.setattr(generation, "pieces", own)
    monkeypatch.setattr(sys, "stdin", Terminal("nine?\nand?\n"))
    again, _ = asked(capsys, f"run={runs['a']}", "raw=true")
    assert answers[2] == [part.strip() for part in again.split("> ")[1:]][1]


def test_a_run_is_asked_in_its_own_template(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    framed = objects(capsys, f"run={runs['f']}", "prompt=nine?")["answers"]
    # the plain template: what is said, a line end, the answer
    assert framed == objects(capsys, f"run={runs['f']}", "prompt=nine?\n", "raw=true")["answers"]
    assert framed != objects(capsys, f"run={runs['f']}", "prompt=nine?", "raw=true")["answers"]
    mixed = objects(capsys, f"adapters={{x: {runs['a']}, y: {runs['f']}}}", "prompt=nine?")["answers"]
    assert mixed["y"] == framed["tuned"]
    assert mixed["x"] == objects(capsys, f"run={runs['a']}", "prompt=nine?")["answers"]["tuned"]


def test_a_pipe_is_the_prompt(runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("nine?\n"))
    found = objects(capsys, f"run={runs['a']}")
    assert found["prompt"] == "nine?"
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert "prompt is missing" in asked(capsys, f"run={runs['a']}", code=2)[1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("run={a}", "prompt=a", "prompts=b"), "prompt and prompts: give one of them"),
        (("run={a}", "prompt=a", "top_p=0.5"), "no effect with temperature=0"),
        (("run={a}", "prompt=a", "temperature=-1"), "temperature=-1: expected a number, 0 or more"),
        (("run={a}", "prompt=a", "adapter=tune"), "Did you mean 'tuned'"),
        (("run={a}", "prompt=a", "out=x.jsonl"), "needs prompts=FILE"),
        (("run={a}", "prompt=a", "batch_rows=2"), "batch_rows=2: needs prompts=FILE"),
        (("run={a}", "blend={{x: 1}}"), "blend: needs adapters"),
        (("run={a}", "prompts=/nowhere.txt"), "no such file"),
        (("prompt=a",), "run is missing"),
        (("adapters={{x: {a}, y: {e}}}", "prompt=a"), "it trained the base's own weights"),
        (("adapters={{base: {a}}}", "prompt=a"), "the untuned model's own name"),
    ],
)
def test_mistakes_are_answered(
    line: tuple[str, ...], said: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    found = asked(capsys, *(word.format(**runs) for word in line), code=2)[1]
    assert said in found
    assert "Traceback" not in found
