"""The command line: exit codes, one message each, Hydra's flags, sweeps, completion, the time of an answer."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from ftrun.compose import choices_of, compose

ROOT = Path(__file__).parent.parent
# seconds of processor time, which does not count what else the machine does
BOUND = 1.5


def ftrun(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ftrun", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, check=False)


def mistake(*arguments: str, cwd: Path | None = None) -> str:
    """What is said to a mistake: exit code 2, one line, nothing on standard output."""
    done = ftrun(*arguments, cwd=cwd)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("ftrun: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["metod=lora"], "Did you mean 'method'"),
        (["method=full", "rank=16"], "has no such option"),
        (["layers=0,3"], "layers=[0,3]"),
        (["tarin"], "Did you mean 'train'"),
        (["train", "plan"], "KEY=VALUE"),
        (["--rank", "8"], "rank=8"),
        (["--micro-batch=8"], "micro_batch=8"),
        (["--confg", "job"], "Did you mean '--cfg'"),
        (["--cfg", "jbo"], "Did you mean 'job'"),
        (["--cfg"], "its value is missing"),
        (["--resolve"], "--cfg"),
        (["--config-dir", "nowhere"], "no such folder"),
        (["--cfg", "job", "--package", "methd"], "Did you mean 'method'"),
        (["data", "rows=x"], "rows=x: expected an integer"),
        (["data", "format=jsn"], "Did you mean 'json'"),
        (["data", "rows=["], "rows=[: expected an integer"),
        (["data", "rows=*x"], "rows=*x: expected an integer"),
        (["name=" + "x" * 300], "300 bytes, expected 255 or less"),
        (["devices=2"], "one device"),
        (["strategy=ddp"], "one device"),
        (["method=full", "quant=nf4"], "quantised weights cannot be trained"),
        (["layers=40-50"], "the model has 30 layers"),
        (["checkpointing=40"], "the model has 30 layers"),
        (["job="], "expected the path of a job.yaml"),
        (["-sc", "install=bsh"], "Did you mean 'bash'"),
        (["-m", "rank=4,-8"], "rank=-8"),
        (["data=jsonl", "data.path=READMEE.md"], "Did you mean 'README.md'"),
    ],
)
def test_mistakes(typed: list[str], said: str) -> None:
    assert said in mistake(*typed, cwd=ROOT) if typed[-1].startswith("data.path") else said in mistake(*typed)


def test_a_mistake_leaves_nothing_behind(tmp_path: Path) -> None:
    mistake("rank=abc", "out=here", cwd=tmp_path)
    mistake("data=jsonl", "data.path=missing.jsonl", "out=here", cwd=tmp_path)
    mistake("-m", "rank=4,abc", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_base_without_weights_is_told_before_anything_is_shown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    assert "no weights" in mistake(f"model.path={tmp_path}")
    assert "the model has 2 layers" in mistake(f"model.path={tmp_path}", "layers=2")
    (tmp_path / "pytorch_model.bin").touch()
    assert "pickle" in mistake(f"model.path={tmp_path}")
    (tmp_path / "rows.jsonl").touch()
    assert "the file is empty" in mistake("data=jsonl", f"data.path={tmp_path}/rows.jsonl")


def test_a_signal_while_the_program_starts_is_an_interruption(tmp_path: Path) -> None:
    """The imports before main's own answer: an import that is interrupted."""
    (tmp_path / "difflib.py").write_text("raise KeyboardInterrupt")
    done = ftrun("rank=4", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (done.returncode, done.stderr) == (130, "ftrun: interrupted\n")


def test_a_user_without_a_home(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import pathlib\ndef home(): raise RuntimeError\n" + HOMELESS)
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "FTRUN_CACHE": ""}
    for typed, said in ((["data.path=~/x", "data=jsonl"], "set HOME"), (["rank=4"], "set FTRUN_CACHE=DIR")):
        done = ftrun(*typed, cwd=tmp_path, **env)
        assert done.returncode == 2, done
        assert said in done.stderr
        assert "Traceback" not in done.stderr


HOMELESS = """
def expanduser(self):
    if str(self).startswith("~"):
        raise RuntimeError
    return self
pathlib.Path.home = classmethod(lambda cls: home())
pathlib.Path.expanduser = expanduser
"""


def test_arguments_that_are_no_text() -> None:
    done = subprocess.run([sys.executable.encode(), b"-m", b"ftrun", b"name=\xff"], capture_output=True, check=False)
    assert done.returncode == 2
    assert b"UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr
    assert len(mistake("rank=" + "x" * 100_000)) < 600


def test_debug_shows_the_traceback() -> None:
    for typed in (
        ["rank=abc", "debug=true"],
        ["debug=True", "data", "rank=abc"],
        ["--cfg", "job", "debug=true", "rank=abc"],
    ):
        done = ftrun(*typed)
        assert done.returncode != 0
        assert "Traceback" in done.stderr


def test_cfg_job(tmp_path: Path) -> None:
    done = ftrun("method=qlora", "rank=8", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0
    tree = yaml.safe_load(done.stdout)
    assert (tree["rank"], tree["method"]["rank"], tree["quant"]["kind"]) == (8, "${rank}", "nf4")
    assert yaml.safe_load(ftrun("-c", "job", "--resolve", "rank=8").stdout)["method"]["rank"] == 8
    part = ftrun("data", "rows=5", "--cfg", "job", "--package", "optim").stdout
    assert part.startswith("# @package optim\n")
    assert yaml.safe_load(part)["kind"] == "adamw"
    assert ftrun("recipe=lora-plus", "--cfg=job", "-p", "optim").stdout.count("lora_plus: 16") == 1
    assert list(tmp_path.iterdir()) == []


def test_hydras_own_views(tmp_path: Path) -> None:
    (tmp_path / "a, b" / "method").mkdir(parents=True)
    (tmp_path / "a, b" / "method" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - lora\n")
    done = ftrun("--info", "defaults-tree", "--config-dir", "a, b", "method=mine", "name=it's", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "method: mine" in done.stdout
    assert "rank" in ftrun("--info", "config", "recipe=lora-plus").stdout
    assert "hydra:" in ftrun("--cfg", "all").stdout
    mistake("--info", "defaults", "rank=abc")
    assert [p.name for p in tmp_path.iterdir()] == ["a, b"]


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A path that puts a task in the place of training: it prints the job and ends as rank says."""
    folder = tmp_path_factory.mktemp("echo")
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent("""
        import sys, types
        task = types.ModuleType("ftrun.tasks.train")
        def run(job):
            import os
            rank, path = job.method.options.rank, getattr(job.data.options, "path", "")
            print(os.getpid(), job.method.choice, rank, job.name, job.out, path, sep="|")
            return {5: 3, 6: 130}.get(rank, 0)
        task.run = run
        sys.modules["ftrun.tasks.train"] = task
        """)
    )
    (folder / "a b.txt").write_text("text")
    (folder / "c,d.txt").write_text("text")
    return str(folder)


def runs(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    return [line.split("|") for line in done.stdout.splitlines()]


def test_every_combination_runs_in_a_process_of_its_own(echo: str) -> None:
    typed = ["-m", "method=lora,dora", "rank=4,8", "data=text", f"data.path={echo}/a b.txt"]
    done = ftrun(*typed, PYTHONPATH=echo)
    assert done.returncode == 0, done.stderr
    found = runs(done)
    assert [(method, rank) for _, method, rank, *_ in found] == [
        ("lora", "4"),
        ("lora", "8"),
        ("dora", "4"),
        ("dora", "8"),
    ]
    assert len({process for process, *_ in found}) == 4
    assert len({name for _, _, _, name, *_ in found}) == 4
    assert all(path == f"{echo}/a b.txt" for *_, path in found)
    assert "1 of 4: method=lora rank=4" in done.stderr
    assert "4 of 4" in done.stderr


def test_sweeps_keep_folders_apart(echo: str) -> None:
    found = runs(ftrun("-m", "rank=4,8", "out=runs/it's", "data=text", f"data.path={echo}/c,d.txt", PYTHONPATH=echo))
    assert [out for *_, out, _ in found] == ["runs/it's/rank4", "runs/it's/rank8"]
    assert {path for *_, path in found} == {f"{echo}/c,d.txt"}
    paths = f"data.path={echo}/a b.txt,{echo}/a b.txt"
    found = runs(ftrun("--multirun", "data=text", paths, "name=x", PYTHONPATH=echo))
    assert len(found) == 2
    assert found[0][3] != found[1][3]
    assert all("x" in name for _, _, _, name, *_ in found)


def test_the_first_failure_is_the_exit_code_and_an_interrupt_ends_a_sweep(echo: str) -> None:
    done = ftrun("-m", "rank=4,5,8", PYTHONPATH=echo)
    assert (done.returncode, len(runs(done))) == (3, 3)
    assert "1 of 3 did not end well" in done.stderr
    done = ftrun("-m", "rank=4,6,8", PYTHONPATH=echo)
    assert (done.returncode, len(runs(done))) == (130, 2)


def test_a_sweep_is_valid_as_a_whole_before_it_starts(echo: str) -> None:
    done = ftrun("-m", "rank=4,8", "method=lora,full", PYTHONPATH=echo)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "[in: rank=4 method=full]" in done.stderr


# completion


def completions(line: str, **env: str) -> list[str]:
    done = ftrun("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)), **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_completion(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    assert completions("ftrun met") == ["method="]
    assert completions("ftrun tr") == ["train"]
    assert completions("ftrun method=qlo") == ["method=qlora"]
    assert completions("ftrun train optim=") == [f"optim={name}" for name in choices_of("optim")]
    assert completions("ftrun -m method=lora,hou") == ["method=lora,houlsby"]
    assert {"method.tokens=", "method.init="} <= set(completions("ftrun method=prompt method."))
    assert completions("ftrun recipe=lora") == ["recipe=lora-plus"]
    assert completions("ftrun kernels=") == ["kernels=fast", "kernels=reference"]
    assert completions("ftrun debug=t") == ["debug=true"]
    assert completions(f"ftrun data.path={tmp_path}/ro") == [f"data.path={tmp_path}/rows.jsonl"]
    assert completions("ftrun --conf") == ["--config-dir"]
    assert completions("ftrun metod=lora ran") == ["rank="]
    assert completions("ftrun nothing=") == []


def test_the_shells_script_completes_the_command(tmp_path: Path) -> None:
    (tmp_path / "ftrun").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ftrun "$@"\n')
    (tmp_path / "ftrun").chmod(0o755)
    script = textwrap.dedent("""
        eval "$(ftrun -sc install=bash)"
        COMP_LINE="ftrun method=qlo"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=(ftrun method=qlo); COMP_CWORD=1
        hydra_bash_completion
        echo "${COMPREPLY[@]}"
        complete -p ftrun
    """)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, check=False)
    assert done.stdout.splitlines()[0] == "method=qlora", done
    assert "hydra_bash_completion" in done.stdout
    assert ftrun("-sc", "install=zsh").returncode == ftrun("-sc", "install=fish").returncode == 0
    assert "unset" in ftrun("-sc", "uninstall=bash").stdout


# how long an answer takes


def seconds(*typed: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ftrun(*typed)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "typed",
    [
        ["--help"],
        ["train", "--help"],
        ["--version"],
        ["--cfg", "job"],
        ["metod=lora"],
        ["method=full", "rank=16"],
        ["rank=abc"],
        ["targets=re:("],
        ["data=jsonl", "data.path=missing.jsonl"],
        ["job=missing.yaml"],
        ["recipe=nope"],
        ["layers=[" + "0," * 2_000 + "x]"],
    ],
)
def test_answers_come_at_once(typed: list[str]) -> None:
    assert min(seconds(*typed) for _ in range(3)) < BOUND


# variants from outside

IA3 = '''
"""(IA)3 (Liu et al. 2022, arXiv:2205.05638): a learnt scale on the outputs of the selected linear layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ftrun.kernels.dense import dense_weight, features
from ftrun.methods import base
from ftrun.schema import option
from ftrun.selection import check_targets


@dataclass(frozen=True)
class Options:
    start: float = option(1.0, "value of every scale at the start; 1 = the base itself", gt=0)
    targets: str | list[str] = option("[k_proj,v_proj]", "which weights")
    layers: str | int | list[str | int] = option("all", "which decoder layers")
    dtype: str = option("float32", "dtype of the scales", choices=("float32", "bfloat16"))

    def __post_init__(self) -> None:
        check_targets(self.targets)


class Scaled(base.Wrapper):
    def __init__(self, name, layer, start, dtype):
        super().__init__(name, layer)
        self.start, self.ia3_l = start, base.parameter((features(layer)[1],), layer, dtype)

    def own(self):
        return {"ia3_l": base.Trained("other", self.ia3_l)}

    def reset(self, seed):
        torch.nn.init.constant_(self.ia3_l, self.start)

    def forward(self, x):
        out = self.base(x)
        return out * self.ia3_l.to(out.dtype) if self.enabled else out

    def merged_weight(self):
        return dense_weight(self.base, torch.float32) * self.ia3_l[:, None].float()


class Tuner(base.Tuner):
    def wrap(self, model, anatomy, kernels):
        dtype = getattr(torch, self.options.dtype)
        make = lambda site: Scaled(site.name, model.get_submodule(site.name), self.options.start, dtype)
        return [make(site) for site in anatomy.sites]

    def adapter_config(self, anatomy, base_name):
        return {"peft_type": "IA3", "base_model_name_or_path": base_name}
'''
IA3_YAML = """# @package _global_
# ftrun --config-dir conf method=ia3
targets: [k_proj, v_proj]
layers: all
lr: 3e-3
method:
  kind: ia3
  start: 1.0
  targets: ${targets}
  layers: ${layers}
  dtype: float32
"""


@pytest.fixture(scope="module")
def ia3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distribution as pip would leave it, with a method of its own, and a folder of YAMLs beside it."""
    folder = tmp_path_factory.mktemp("ia3")
    package, info, conf = (
        folder / "site" / "ia3_for_ftrun",
        folder / "site" / "ia3_for_ftrun-1.0.dist-info",
        folder / "conf",
    )
    for made in (package, info, conf / "method"):
        made.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "ia3.py").write_text(IA3)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ia3-for-ftrun\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ftrun.methods]\nia3 = ia3_for_ftrun.ia3\nlost = ia3_for_ftrun.lost\n")
    (conf / "method" / "ia3.yaml").write_text(IA3_YAML)
    (conf / "method" / "lost.yaml").write_text("kind: lost\n")
    (conf / "method" / "never.yaml").write_text("kind: never\n")
    return folder


def test_a_method_from_outside_is_one_file_and_one_yaml(ia3: Path) -> None:
    outside = {"PYTHONPATH": str(ia3 / "site"), "cwd": ia3}
    done = ftrun("--config-dir", "conf", "method=ia3", "targets=[q_proj]", "--cfg", "job", **outside)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["method"]["kind"] == "ia3"
    for typed, said in (
        (["method=ia3", "method.start=0"], "method.start=0: expected a number, more than 0"),
        (["method=ia3", "rank=8"], "method=ia3 has no such option"),
        (["method=lost"], "is not installed"),
        (["method=never"], "'never' is unknown"),
    ):
        done = ftrun("--config-dir", "conf", *typed, **outside)  # type: ignore[arg-type]
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    help_text = ftrun("train", "method=ia3", "--config-dir", "conf", "--help", **outside).stdout  # type: ignore[arg-type]
    assert "method.start=1.0" in help_text


def test_the_command_is_the_module() -> None:
    assert ftrun("--version").stdout.startswith("ftrun 0.")
    assert compose([]).choices["method"] == "lora"


def test_a_method_from_outside_trains(ia3: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from tests.families import save_tiny

    save_tiny("llama", tmp_path / "model")
    rows = [{"prompt": f"What is {n} and {n}?", "completion": f"{2 * n}, I think."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    typed = [
        "model=folder",
        f"model.path={tmp_path}/model",
        "model.dtype=float32",
        "data=jsonl",
        "data.path=rows.jsonl",
    ]
    typed += ["steps=3", "batch=4", "seq_len=64", "lr=1e-2", "device=cpu", "out=run", "eval=none", "method=ia3"]
    outside = {**os.environ, "PYTHONPATH": str(ia3 / "site")}
    command = [sys.executable, "-m", "ftrun", "--config-dir", str(ia3 / "conf"), *typed]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=outside, check=False)
    assert done.returncode == 0, done.stderr
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 4  # k and v in two layers
    assert all(name.endswith("ia3_l") and (tensor != 1).any() for name, tensor in saved.items())
    assert yaml.safe_load((tmp_path / "run" / "job.yaml").read_text())["choices"]["method"] == "ia3"
