"""Every quantiser, optimiser, data format and recipe that conf/ names runs: composed, trained two steps, written."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ftrun import assemble
from ftrun.groups import choices_of, study_of
from ftrun.runs import cache_dir
from ftrun.studies.points import Points
from ftrun.studies.study import read_study
from ftrun.tasks import train as task
from tests.jobs import tiny_job, write_rows

STEPS = ("steps=2", "rank=4", "lr=1e-2", "eval.max_new_tokens=0")


def result(folder: Path) -> dict:
    found = json.loads((folder / "run" / "result.json").read_text())
    assert found["status"] == "finished"
    return found


@pytest.mark.parametrize("quant", choices_of("quant"))
def test_quantisers(tmp_path: Path, quant: str) -> None:
    job = tiny_job(tmp_path, "method=lora", f"quant={quant}", "model.dtype=bfloat16", *STEPS)
    task.run(job)
    found = result(tmp_path)
    assert abs(found["memory"]["error"]) < 0.02
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["at_peak"]["quant_constants"] > 0) == (quant != "none")
    # the plan counts the stored bytes that the quantiser owns to
    parts = assemble.sketch(job, cache_dir(), print)
    if quant != "none":
        shapes = [(s.out_features, s.in_features) for s in parts.anatomy.sites]
        stored = sum(parts.quantiser.bytes_for(*shape)["quant_constants"] for shape in shapes)
        assert plan["at_peak"]["quant_constants"] == stored


@pytest.mark.parametrize("optim", choices_of("optim"))
@pytest.mark.few(4)
def test_optimisers(tmp_path: Path, optim: str) -> None:
    task.run(tiny_job(tmp_path, "method=lora", f"optim={optim}", *STEPS))
    assert result(tmp_path)["loss_last"] > 0


@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_kernels(tmp_path: Path, kernels: str) -> None:
    task.run(tiny_job(tmp_path, "method=lora", f"kernels={kernels}", *STEPS))
    assert result(tmp_path)["loss_first"] == pytest.approx(6.06, abs=0.3)


@pytest.mark.parametrize("log", ["none", "tensorboard", "wandb"])
def test_logs(tmp_path: Path, log: str) -> None:
    task.run(tiny_job(tmp_path, "method=lora", f"log={log}", *STEPS))
    result(tmp_path)
    if log != "none":
        assert any(p.is_file() for p in (tmp_path / "run").rglob("*") if log in str(p.parent) or "events" in p.name)


ROWS = [{"question": f"How much is {i} and {i}?", "answer": f"{2 * i}"} for i in range(12)]


def as_csv(folder: Path) -> list[str]:
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)
    return [f"data.path={folder}/rows.csv"]


def as_json(folder: Path) -> list[str]:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return [f"data.path={folder}/rows.json"]


def as_jsonl(folder: Path) -> list[str]:
    return [f"data.path={write_rows(folder / 'lines.jsonl', 12)}"]


def as_parquet(folder: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return [f"data.path={folder}/rows.parquet"]


def as_folder(folder: Path) -> list[str]:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return [f"data.path={folder}/saved"]


def as_text(folder: Path) -> list[str]:
    (folder / "book.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    return [f"data.path={folder}/book.txt"]


def as_mix(folder: Path) -> list[str]:
    (first,), (second,) = as_csv(folder), as_jsonl(folder)
    paths = [one.partition("=")[2] for one in (first, second)]
    return [f"data.sources=[{{path: '{paths[0]}', weight: 2}}, {{path: '{paths[1]}', weight: 1}}]"]


# hub asks the network: tests/data has its own tests
FORMATS: dict[str, Callable[[Path], list[str]]] = {
    "chatterbot": lambda folder: ["data.topics=[ai]"],
    "csv": as_csv,
    "folder": as_folder,
    "json": as_json,
    "jsonl": as_jsonl,
    "mix": as_mix,
    "parquet": as_parquet,
    "text": as_text,
}


def test_every_format_is_here() -> None:
    assert {*FORMATS, "hub"} == set(choices_of("data"))


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(tmp_path: Path, kind: str) -> None:
    job = tiny_job(tmp_path, "method=lora", f"data={kind}", *FORMATS[kind](tmp_path), "data.held_out=2", *STEPS)
    task.run(job)
    found = result(tmp_path)
    assert found["eval"]["before"]["tokens"] > 0
    assert found["tokens"] > 0


@pytest.mark.parametrize("recipe", choices_of("recipe"))
@pytest.mark.few(2)
def test_recipes(tmp_path: Path, recipe: str) -> None:
    """Each recipe as it stands, on a tiny base and few steps."""
    job = tiny_job(tmp_path, f"recipe={recipe}", "data.topics=[ai]", "steps=2", "eval.max_new_tokens=0")
    task.run(job)
    result(tmp_path)


@pytest.mark.parametrize("recipe", [r for r in choices_of("recipe") if study_of(r)])
def test_every_point_of_a_recipes_study_is_a_job(recipe: str) -> None:
    study = read_study([f"recipe={recipe}"])
    search = study.search.load().Search(study.search.typed(), study.axes, study.fixed)
    made = [Points(study).make(values) for values in search.points()]
    assert [p.trouble for p in made if p.job is None] == []
    assert len({p.key for p in made}) == len(made) or search.more
