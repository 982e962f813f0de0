"""The layer search finds a planted answer: small models in which only two of eight layers can solve the task."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ftrun.errors import UserError
from ftrun.studies.search.layers import Options, Search
from ftrun.studies.searching import Outcome, Trial
from ftrun.studies.study import Axis
from tests.families import tiny_model, tiny_tokenizer
from tests.jobs import tiny_base, write_rows
from tests.studies.small import events, ftrun

ABLE = (3, 4)
DEPTH, ASIDE = 8, slice(48, None)  # the dimensions of the residual stream that layers may be confined to
INNER = "[q_proj,k_proj,v_proj,gate_proj,up_proj]"  # what cannot act where its layer's outputs are closed


def planted(folder: Path, faint: float | None = None) -> Path:
    """A model whose other layers cannot solve a task: they write nothing; or, with `faint`, to 16 dimensions alone.

    No layer reads those dimensions. The head does, faintly, and alike for both answers: there the other layers learn
    which tokens are answers, and never which of them is right.
    """
    model, tokenizer = tiny_model("llama", DEPTH, initializer_range=0.3, intermediate_size=128), tiny_tokenizer()
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            closed = slice(None) if faint is None else slice(0, ASIDE.start)
            for out in (attention.o_proj, mlp.down_proj):
                out.weight[ASIDE if number in ABLE else closed] = 0
            for inner in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                inner.weight[:, ASIDE] = 0
        yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in "ab")
        model.lm_head.weight[:, ASIDE] *= faint or 0
        model.lm_head.weight[yes, ASIDE] = model.lm_head.weight[no, ASIDE]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def questions(path: Path, count: int = 200) -> Path:
    """The answer is a letter that one of three words decides: attention has to carry it to the end of the row."""
    rng, rows = random.Random(0), []
    for _ in range(count):
        said = rng.random() < 0.5
        words = [rng.choice(("red", "blue", "cat", "dog", "sun")) for _ in range(3)]
        words[rng.randrange(3)] = "YES" if said else "NO"
        rows.append({"question": " ".join(words), "answer": "a" if said else "b"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def typed(base: Path, rows: Path, *more: str) -> list[str]:
    """The search as a user types it."""
    common = [f"model.path={base}", "model.dtype=float32", "data=jsonl", f"data.path={rows}", "data.held_out=40"]
    common += ["steps=30", "batch=16", "seq_len=64", "method=lora", "rank=8", "lr=1e-2", f"targets={INNER}"]
    # two workers have a core each, however busy the machine is
    common += ["device=cpu", "launcher.workers=2", "eval.max_new_tokens=0", "eval.retention=0", "save_every=null"]
    return ["-m", "search=layers", *common, *more]


def sets(study: Path) -> dict[str, dict[str, Any]]:
    """What was trained, by note: the values, and the figures that it came to."""
    trials = {e["number"]: e for e in events(study) if e["event"] == "trial" and e["kind"] == "train"}
    ends = {e["number"]: e for e in events(study) if e["event"] == "end"}
    assert all(ends[number]["status"] == "finished" for number in trials)
    return {t["note"]: {**t["values"], **ends[n]["figures"], "folder": t["folder"]} for n, t in trials.items()}


@pytest.mark.parametrize("faint", [None, 0.1], ids=["the others are shut", "the others have gradients too"])
@pytest.mark.few(1)
def test_it_finds_the_two_layers_that_can_solve_the_task(tmp_path: Path, faint: float | None) -> None:
    base, rows = planted(tmp_path / "base", faint), questions(tmp_path / "rows.jsonl")
    done = ftrun(typed(base, rows, "budget=2", f"out={tmp_path / 'study'}"))
    assert done.returncode == 0, done.stderr
    found = sets(tmp_path / "study")
    assert set(found) == {"chosen", "uniform", "random", "all"}
    assert found["chosen"]["layers"] == "[3,4]"
    for other in ("uniform", "random"):
        assert not set(json.loads(found[other]["layers"])) & set(ABLE), "no rival has what it needs"
        assert found["chosen"]["loss"] < 0.1 * found[other]["loss"]
        assert found["chosen"]["trainable_params"] == found[other]["trainable_params"]
    assert found["chosen"]["loss"] < 0.05
    assert found["chosen"]["trainable_params"] * DEPTH / 2 == found["all"]["trainable_params"]
    losses = [f"{found[note]['loss']:.4f} of {note}" for note in ("uniform", "random", "all")]
    assert f"selection paid: held-out loss {found['chosen']['loss']:.4f} against {', '.join(losses)}" in done.stdout
    assert "chosen: layers=[3,4]: 2 of 8 layers" in done.stdout
    assert f"uniform (layers=[2,6]): {found['uniform']['trainable_params']:,} parameters, " in done.stdout
    places = next(e["probe"]["places"] for e in events(tmp_path / "study") if e.get("probe"))
    others = [place for place in places if place["layer"] not in ABLE and place["kind"] == "up_proj"]
    assert all((place["norm"] > 0) == (faint is not None) for place in others)


@pytest.mark.slow
def test_modules_under_a_budget_of_bytes_and_a_study_that_goes_on(tmp_path: Path) -> None:
    base, rows = tiny_base(tmp_path / "llama"), write_rows(tmp_path / "rows.jsonl")
    study = tmp_path / "study"
    job = ("targets=all", "seq_len=128", "steps=2", "rank=4", "batch=4", "data.held_out=4")
    command = typed(base, rows, "search.choose=modules", "search.unit=bytes", "budget=30000", *job, f"out={study}")
    done = ftrun(command)
    assert done.returncode == 0, done.stderr
    found = sets(study)
    for note, of in found.items():
        written = (study / "runs" / of["folder"] / "adapter" / "adapter_model.safetensors").stat().st_size
        assert written > 30000 if note == "all" else 20000 < written <= 30000, note
    assert found["chosen"]["targets"].startswith("re:")
    before = events(study)
    assert sum(e["event"] == "begin" for e in before) == 4
    again = ftrun(command)
    assert (again.returncode, events(study)) == (0, before)
    assert again.stdout.splitlines()[-3:] == done.stdout.splitlines()[-3:]
    more = ftrun([*command, "search.repeats=2"])
    assert more.returncode == 0, more.stderr
    assert [e["note"] for e in events(study)[len(before) :] if e["event"] == "trial"] == ["random 2"]


@pytest.mark.slow
def test_a_budget_that_leaves_no_choice_and_a_method_without_layers(tmp_path: Path) -> None:
    base, rows = tiny_base(tmp_path / "llama"), write_rows(tmp_path / "rows.jsonl")
    job = ("steps=2", "seq_len=128", "batch=4", "data.held_out=4")
    whole = ftrun(typed(base, rows, *job, "budget=2", f"out={tmp_path / 'whole'}"))
    assert whole.returncode == 2
    assert "everything fits, so that nothing is left to choose; the 2 layers of the job have 2 layers" in whole.stderr
    command = typed(base, rows, *job, f"out={tmp_path / 'none'}", "method=prompt")
    prompt = ftrun([word for word in command if word.partition("=")[0] not in ("rank", "targets")])
    assert "method=prompt: has no layers to choose from; search=layers works with dora, full" in prompt.stdout


# --- the search alone ---


def place(layer: int, kind: str, score: float, parameters: int = 10) -> dict[str, Any]:
    path = f"mlp.{kind}"
    name = f"model.layers.{layer}.{path}"
    sizes = {"parameters": parameters, "bytes": 4 * parameters, "score": score, "norm": score}
    return {"name": name, "layer": layer, "path": path, "kind": kind, "can": True, **sizes}


def probed(places: list[dict[str, Any]]) -> Outcome:
    asked = {"layers": "all", "targets": "all"}
    return Outcome("finished", probe={"rows": 32, "adapter": True, "asked": asked, "places": places})


def searched(options: Options, places: list[dict[str, Any]], seeds: tuple[str, ...] = ()) -> tuple[Search, list[Trial]]:
    search = Search(options, [Axis("seed", seeds)] if seeds else [], [])
    probe = search.ask()
    assert probe is not None
    assert (probe.kind, search.ask()) == ("probe", None)
    search.tell(probe, probed(places))
    trials = []
    while (trial := search.ask()) is not None:
        trials.append(trial)
    return search, trials


def test_what_it_says_when_selection_did_not_pay() -> None:
    places = [place(layer, "up_proj", score=layer) for layer in range(6)]
    search, trials = searched(Options(budget=2, repeats=2), places, ("0", "1"))
    assert [(t.note, t.values["layers"]) for t in trials[::2]] == [
        ("chosen", "[4,5]"),
        ("uniform", "[1,4]"),
        ("all", "all"),
        ("random", "[2,5]"),
        ("random 2", "[1,5]"),
    ]
    losses = {"chosen": 2.5, "uniform": 2.4, "all": 2.0, "random": 2.6, "random 2": 2.8}
    for trial in trials:
        figures = {"loss": losses[trial.note] + 0.01 * int(trial.values["seed"]), "tokens_per_s": 100.0}
        search.tell(trial, Outcome("finished", figures=figures))
    (said,) = [line for line in search.sentences([]) if line.startswith("selection")]
    assert said.startswith("selection did not pay: held-out loss 2.5050 ± 0.0071 against 2.4050 ± 0.0071 of uniform, ")
    assert "2.7050 ± 0.1156 of random, 2.0050 ± 0.0071 of all; uniform is 0.1000 lower" in said


def test_a_failed_probe_and_a_failed_set_are_told() -> None:
    search = Search(Options(), [], [])
    probe = search.ask()
    assert probe is not None
    search.tell(probe, Outcome("failed", "the worker died"))
    assert search.ask() is None
    assert search.sentences([]) == ["search=layers: the probe gave no ranking: the worker died"]
    search, trials = searched(Options(budget=1), [place(n, "up_proj", 1.0 + n) for n in range(4)])
    for trial in trials:
        ended = Outcome("failed", "lost") if trial.note == "chosen" else Outcome("finished", figures={"loss": 1.0})
        search.tell(trial, ended)
    said = search.sentences([])
    assert "chosen: failed: lost" in said
    assert any("not known" in line for line in said)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choose": "modules", "unit": "layers"}, "with search.choose=modules expected modules, parameters, bytes"),
        ({"choose": "layers", "unit": "kinds"}, "expected layers, modules"),
        ({"repeats": 2, "against": ["uniform"]}, "has no effect without random"),
    ],
)
def test_options_that_contradict_one_another(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Options(**options)


def test_only_seeds_are_swept() -> None:
    with pytest.raises(UserError, match="give rank one value"):
        Search(Options(), [Axis("rank", ("4", "8"))], [])
