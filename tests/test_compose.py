"""Composition: groups, keys, job.yaml and recipes become one job, or one message that helps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftrun.compose import choices_of, compose, composed, sweep
from ftrun.errors import UserError
from ftrun.groups import conf_dir, keys_of, overrides_of, owners
from ftrun.job import ROOMS

# choices that are nothing without a value of the user's own
ASKED = {
    "model=folder": "model.path=some/folder",
    "model=hub": "model.path=org/name",
    "data=hub": "data.path=org/name",
    "data=mix": "data.sources=[{path: README.md, kind: text}]",
    **{f"data={kind}": "data.path=README.md" for kind in ("csv", "folder", "json", "jsonl", "parquet", "text")},
}


def message(*arguments: str) -> str:
    """What the user reads for a command line that is wrong."""
    with pytest.raises(UserError) as caught:
        compose(arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert 10 < len(text) < 700
    return text


def write_job(folder: Path, *arguments: str, **changes: Any) -> Path:
    """The job.yaml of a command line, with changed or (None) removed keys."""
    content = yaml.safe_load(yaml.safe_dump(compose(arguments).as_dict()))
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (content | changes).items() if v is not None}))
    return path


def test_the_default_job() -> None:
    job = compose([])
    assert job.choices["model"] == "smollm2-135m"
    assert job.choices["method"] == "lora"
    assert job.method.options.rank == 16


def test_root_keys_reach_the_options() -> None:
    job = compose(["method=qlora", "rank=8", "alpha=4", "targets=[q_proj,v_proj]", "layers=last:8", "lr=1e-3"])
    options = job.method.options
    assert (options.rank, options.alpha, options.targets, options.layers) == (8, 4.0, ["q_proj", "v_proj"], "last:8")
    assert job.lr == 1e-3
    assert (job.quant.choice, job.quant.kind, job.quant.module) == ("nf4", "nf4", "ftrun.models.quant.nf4")


def test_an_option_by_its_path_is_the_key_at_the_root() -> None:
    job = compose(["method.rank=8"])
    assert job == compose(["rank=8"])
    assert job.tree["rank"] == job.tree["method"]["rank"] == 8
    assert "method.rank=abc" in message("method.rank=abc")
    assert "give it once" in message("method.rank=8", "rank=9")
    assert compose(["method.rank=8", "rank=8"]).method.options.rank == 8


def test_a_choice_brings_another_and_the_user_has_the_last_word() -> None:
    assert compose(["method=qlora"]).choices["quant"] == "nf4"
    assert compose(["method=qlora", "quant=fp4"]).choices["quant"] == "fp4"
    assert overrides_of("method", "qlora")["quant"] == "nf4"


def test_references_that_the_user_types() -> None:
    assert compose(["method.rank=${batch}"]).method.options.rank == 16
    assert "rank=${nope}" in message("rank=${nope}")
    assert "rank" in message("rank=${rank}")


def test_names_inside_a_mapping_are_free() -> None:
    assert compose(["method.rank_pattern.foo=3"]).method.options.rank_pattern == {"foo": 3}
    job = compose(["method.rank_pattern={last:4: 32, 'mlp.*': 8}"])
    assert job.method.options.rank_pattern == {"last:4": 32, "mlp.*": 8}


@pytest.mark.parametrize("group", list(ROOMS))
def test_every_choice_composes(group: str) -> None:
    for name in choices_of(group):
        asked = ASKED.get(f"{group}={name}")
        if asked:
            # what only the user can know is asked for by its name
            assert asked.partition("=")[0] in message(f"{group}={name}")
        job = compose([f"{group}={name}", *([asked] if asked else [])])
        assert job.choices[group] == name


@pytest.mark.parametrize("name", choices_of("recipe"))
def test_every_recipe_composes(name: str) -> None:
    assert compose([f"recipe={name}"]) != compose([])
    assert compose([f"+recipe={name}"]) == compose([f"recipe={name}"])
    assert compose([f"recipe={name}", "seed=7"]).seed == 7


def test_a_recipe_sets_what_it_says_and_the_command_line_wins() -> None:
    job = compose(["recipe=lora-plus", "rank=4"])
    assert (job.optim.options.lora_plus, job.lr, job.method.options.rank) == (16.0, 1e-4, 4)
    assert compose(["recipe=lora-plus", "method=dora"]).method.kind == "dora"
    assert "recipe=lora-plus sets rank" in message("recipe=lora-plus", "method=full")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("metod=lora", "Did you mean 'method'"),
        ("method=loar", "Did you mean 'lora'"),
        ("method=full rank=16", "method=full has no such option. It belongs to method=dora, method=lora"),
        ("method=prompt method.rank=16", "method=prompt has no such option"),
        ("rank=-1", "rank=-1: expected an integer, 1 or more"),
        ("rank=0", "rank=0: expected an integer, 1 or more"),
        ("rank=abc", "rank=abc: expected an integer, 1 or more, found text"),
        ("rank=", "rank=: expected an integer"),
        ("rank=1.5", "rank=1.5: expected an integer"),
        ("rank=true", "rank=true: expected an integer"),
        ("lr=0", "lr=0: expected a number, more than 0"),
        ("lr=nan", "lr=nan: expected a number"),
        ("lr=inf", "lr=inf: expected a number"),
        ("kernels=fats", "Did you mean 'fast'"),
        ("layers=0,3", "layers=[0,3]"),
        ("layers=lst:3", "layers"),
        ("targets=re:(", "targets"),
        ("rslora=true", "Did you mean 'method.rslora'"),
        ("steps=3 epochs=2", "steps=3 and epochs=2"),
        ("steps=0", "steps=0: expected an integer or null, 1 or more"),
        ("batch=10 micro_batch=4", "a multiple of micro_batch"),
        ("micro_batch=some", "rows at once"),
        ("save_every=soon", "10min"),
        ("seq_len=1", "2 or more"),
        ("name=a/b", "name=a/b"),
        ("name=..", "name=.."),
        ("seed=99999999999999999999", "or less"),
        ("+new.key=1", "the key 'new.key' is unknown"),
        ("++x=1", "the key 'x' is unknown"),
        ("+rank=3", "write rank=3"),
        ("+method=dora", "write method=NAME"),
        ("~method", "choose another value"),
        ("method=", "expected the name of one method: "),
        ("method=[lora,dora]", "expected the name of one method: "),
        ("method={rank:3}", "method.KEY=VALUE"),
        ("method=null", "'null' is unknown"),
        ("method=../config", "is unknown"),
        ("method.kind=dora", "method=NAME"),
        ("method.rank.x=3", "'method.rank.x' is unknown"),
        ("rank.x=3", "'rank.x' is unknown"),
        ("rank=???", "rank is missing"),
        ("model.arch=3", "model.arch=3: expected a mapping"),
        ("method.rank_pattern={a:b}", "method.rank_pattern"),
        ("recipe=nope", "recipe"),
        ("data=jsonl", "data.path"),
        ("hydra.verbose=true", "out=DIR"),
        ("micro-batch=4", "Did you mean 'micro_batch'"),
        ("choices=3", "the key 'choices' is unknown"),
        ("tree=3", "the key 'tree' is unknown"),
    ],
)
def test_mistakes(typed: str, said: str) -> None:
    assert said in message(*typed.split())


def test_nothing_heavy_is_imported() -> None:
    lines = [["method=qlora", "rank=8"], *[[f"method={n}"] for n in choices_of("method")], ["metod=x"], ["rank=-1"]]
    lines += [[f"{g}={n}"] for g in ("quant", "optim", "eval", "log", "device", "data") for n in choices_of(g)]
    code = f"""
import sys
from ftrun.compose import compose
from ftrun.errors import UserError
for line in {lines!r}:
    try:
        compose(line)
    except UserError:
        pass
    heavy = {{"torch", "transformers", "datasets", "accelerate", "bitsandbytes", "numpy", "rich"}} & set(sys.modules)
    assert not heavy, (line, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# job.yaml


@pytest.mark.parametrize(
    "typed",
    [
        [],
        ["method=qlora", "rank=8", "targets=[q_proj,v_proj]", "steps=7", "checkpointing=3"],
        ["method=full", "lr=3e-5", "epochs=1.5"],
        ["method=dora", "method.rank_pattern={last:4: 32}", "quant=nf4", "layers=[0,3]", "optim=sgd", "log=none"],
        [r"targets=re:.*\.(q|v)_proj", "eval.prompt=${rank} it's \\${x}", "model.revision=007"],
        ["recipe=lora-plus"],
    ],
)
def test_a_job_read_back_is_the_same_job(typed: list[str], tmp_path: Path) -> None:
    path = write_job(tmp_path, *typed)
    job = compose([f"job={path}"])
    assert job == compose(typed)
    assert job.as_dict() == compose(typed).as_dict()


def test_what_comes_on_top_of_a_file_reaches_everywhere(tmp_path: Path) -> None:
    path = write_job(tmp_path, "method=qlora", "rank=4", "steps=9", "optim=sgd", "optim.momentum=0.5")
    job = compose([f"job={path}", "rank=8"])
    assert job.tree["rank"] == job.method.options.rank == 8
    assert (job.steps, job.optim.options.momentum, job.choices["quant"]) == (9, 0.5, "nf4")
    assert compose([f"job={path}", "method.rank=8"]) == job
    other = compose([f"job={path}", "epochs=2"])
    assert (other.steps, other.epochs) == (None, 2.0)


def test_a_changed_group_leaves_the_files_values_behind(tmp_path: Path) -> None:
    path = write_job(tmp_path, "method=lora", "rank=4", "lr=1e-5", "method.init=gaussian", "optim=sgd", "seed=3")
    job = compose([f"job={path}", "method=dora"])
    assert job == compose(["method=dora", "optim=sgd", "seed=3"])
    assert compose([f"job={path}", "method=full"]).choices["optim"] == "sgd"
    # the same choice, named again, changes nothing
    assert compose([f"job={path}", "method=lora"]) == compose([f"job={path}"])
    assert compose([f"job={path}", "optim=adamw"]).method.options.rank == 4


def test_a_choice_on_top_of_a_file_brings_what_it_needs(tmp_path: Path) -> None:
    path = write_job(tmp_path, "method=lora")
    assert compose([f"job={path}", "method=qlora"]).choices["quant"] == "nf4"
    path = write_job(tmp_path, "method=lora", "quant=fp4", "optim=sgd")
    assert compose([f"job={path}", "method=qlora"]).choices["quant"] == "fp4"
    assert compose([f"job={path}", "method=qlora"]).choices["optim"] == "sgd"
    path = write_job(tmp_path, "method=lora", "quant=nf4", "quant.double_quant=false")
    kept = compose([f"job={path}", "method=dora"]).quant
    assert (kept.choice, kept.options.double_quant) == ("nf4", False)


def test_a_job_runs_again_in_a_folder_of_its_own(tmp_path: Path) -> None:
    path = write_job(tmp_path, "out=runs/a", "name=a")
    job = compose([f"job={path}"])
    assert (job.out, job.name) == (None, None)
    assert compose([f"job={path}", "out=runs/b"]).out == "runs/b"


def test_a_part_of_a_file_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "my job, (1).yaml"
    path.write_text("choices: {method: qlora}\nrank: 4\nmethod: {init: gaussian}\n")
    assert compose([f"job={path}"]) == compose(["method=qlora", "rank=4", "method.init=gaussian"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "an empty file"),
        ("[1, 2]", "expected a job.yaml"),
        ("rank: 3", "no `choices`"),
        ("choices: {method: [", "not readable as YAML"),
        ("choices: {metod: lora}", "Did you mean 'method'"),
        ("choices: {method: loar}", "Did you mean 'lora'"),
        ("choices: {method: {a: 1}}", "expected a name"),
        ("choices: {}\nrnak: 3", "the key 'rnak' is unknown. Did you mean 'rank'"),
        ("choices: {}\nmethod: {rnak: 3}", "the key 'method.rnak' is unknown"),
        ("choices: {}\nmethod: 3", "expected the mapping of its options"),
        ("choices: {}\nrank: abc", "rank=abc: expected an integer"),
        ("choices: {}\nmethod: {rank: abc}", "rank=abc: expected an integer"),
        ("choices: {}\nrank: 3\nmethod: {rank: 4}", "one option"),
        ("choices: {method: lora}\nmethod: {kind: dora}", "method.kind=dora"),
        ("choices: {}\nsteps: 3\nepochs: 2", "steps=3 and epochs=2"),
    ],
)
def test_damaged_job_files(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    found = message(f"job={path}")
    assert said in found
    assert "steps" in said or str(path) in found


def test_job_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00 not text")
    assert "not readable" in message(f"job={tmp_path}/job.yaml")
    assert "no such file. Did you mean" in message(f"job={tmp_path}/jbo.yaml")
    assert "Did you mean" in message(f"job={tmp_path}")
    assert "one of them" in message(f"job={tmp_path}/job.yaml", "recipe=lora-plus")


# sweeps, and choices from elsewhere


def test_every_combination() -> None:
    lines = sweep(["method=lora,dora", "rank=4,8,16", "seed=1"])
    assert len(lines) == 6
    assert lines[1] == ["method=lora", "rank=8", "seed=1"]
    assert sweep(["method=glob(*dora)"]) == [["method=dora"], ["method=qdora"]]
    assert sweep(["lr=1e-4"]) == [["lr=1e-4"]]
    with pytest.raises(UserError, match="no method matches"):
        sweep(["method=glob(z*)"])


def test_choices_from_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - lora\nrank: 3\n")
    assert "'mine' is unknown" in message("method=mine")
    job = compose(["method=mine"], [tmp_path])
    assert (job.choices["method"], job.method.kind, job.method.options.rank) == ("mine", "lora", 3)
    (tmp_path / "method" / "bad.yaml").write_text("rank: [")
    with pytest.raises(UserError, match=r"bad\.yaml"):
        compose(["method=bad"], [tmp_path])
    (tmp_path / "method" / "odd.yaml").write_text("# @package _global_\ndefaults:\n  - lora\nrnak: 3\n")
    with pytest.raises(UserError, match="'rnak' is unknown"):
        compose(["method=odd"], [tmp_path])


def test_who_sets_a_key() -> None:
    group, names = owners("method.rslora") or ("", [])
    assert group == "method"
    assert {"lora", "qlora"} <= set(names)
    assert "rank" in keys_of("method", "qlora")
    assert owners("nothing") is None
    assert conf_dir().is_dir()


def test_the_unresolved_tree_keeps_its_references() -> None:
    made = composed(["rank=8"])
    assert made.references["method.rank"] == "rank"
    assert made.choices.keys() == ROOMS.keys()
