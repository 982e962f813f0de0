"""The command line: exit codes, one message each, Hydra's flags, sweeps, completion, the time of an answer."""

from __future__ import annotations

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
        (["data", "rosw=3"], "Did you mean 'rows'? ftrun data --help"),
        (["data", "rnk=3"], "Did you mean 'rank'?"),
        (["name=" + "x" * 300], "300 bytes, expected 255 or less"),
        (["devices=2", "nnodes=3"], "multiple of nnodes=3"),
        (["strategy=ddp"], "no effect with devices=1"),
        (["method=full", "quant=nf4"], "quantised weights cannot be trained"),
        (["method=full", "optim=adafactor", "devices=2", "strategy=fsdp"], "the update depends on the whole"),
        (["layers=40-50"], "the model has 30 layers"),
        (["checkpointing=40"], "the model has 30 layers"),
        (["job="], "expected the path of a job.yaml"),
        (["-sc", "install=bsh"], "Did you mean 'bash'"),
        (["-m", "rank=-4,-8"], "rank=-4"),
        (["rank"], "A key is set as KEY=VALUE: rank=…"),
        (["rank=4,8"], "rank=4,8: several values; add -m to run each of them. One value that is a list is written"),
        (["method=lora", "method.from=nowhere/adapter"], "method.from=nowhere/adapter: no such folder"),
        (["model.path=nowhere/at/all"], "model.path=nowhere/at/all: no such folder"),
        (["data=jsonl", "data.path=READMEE.md"], "Did you mean 'README.md'"),
    ],
)
def test_mistakes(typed: list[str], said: str) -> None:
    assert said in mistake(*typed, cwd=ROOT) if typed[-1].startswith("data.path") else said in mistake(*typed)


def test_a_mistake_leaves_nothing_behind(tmp_path: Path) -> None:
    mistake("rank=abc", "out=here", cwd=tmp_path)
    mistake("data=jsonl", "data.path=missing.jsonl", "out=here", cwd=tmp_path)
    mistake("-m", "rank=abc,def", cwd=tmp_path)
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
    """A path that puts a task in the place of `ftrun data`: it prints the job and ends as rank says."""
    folder = tmp_path_factory.mktemp("echo")
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent("""
        import sys, types
        task = types.ModuleType("ftrun.tasks.data")
        def run(job, **options):
            import os
            rank, path = job.method.options.rank, getattr(job.data.options, "path", "")
            print(os.getpid(), job.method.choice, rank, job.name, job.out, path, sep="|")
            return {5: 3, 6: 130}.get(rank, 0)
        task.run = run
        sys.modules["ftrun.tasks.data"] = task
        """)
    )
    (folder / "a b.txt").write_text("text")
    (folder / "c,d.txt").write_text("text")
    return str(folder)


def runs(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    return [line.split("|") for line in done.stdout.splitlines()]


def test_every_combination_runs_in_a_process_of_its_own(echo: str) -> None:
    typed = ["data", "-m", "method=lora,dora", "rank=4,8", "data=text", f"data.path={echo}/a b.txt"]
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
    assert all(path == f"{echo}/a b.txt" for *_, path in found)
    assert "1 of 4: method=lora rank=4" in done.stderr
    assert "4 of 4" in done.stderr


def test_a_swept_path_keeps_its_commas(echo: str) -> None:
    found = runs(ftrun("data", "-m", "rank=4,8", "data=text", f"data.path={echo}/c,d.txt", PYTHONPATH=echo))
    assert [path for *_, path in found] == [f"{echo}/c,d.txt"] * 2
    found = runs(ftrun("data", "--multirun", "data=text", f"data.path={echo}/a b.txt,{echo}/a b.txt", PYTHONPATH=echo))
    assert [path for *_, path in found] == [f"{echo}/a b.txt"] * 2


def test_the_first_failure_is_the_exit_code_and_an_interrupt_ends_a_sweep(echo: str) -> None:
    done = ftrun("data", "-m", "rank=4,5,8", PYTHONPATH=echo)
    assert (done.returncode, len(runs(done))) == (3, 3)
    assert "1 of 3 did not end well" in done.stderr
    done = ftrun("data", "-m", "rank=4,6,8", PYTHONPATH=echo)
    assert (done.returncode, len(runs(done))) == (130, 2)


def test_a_sweep_is_valid_as_a_whole_before_it_starts(echo: str) -> None:
    done = ftrun("data", "-m", "rank=4,8", "method=lora,full", PYTHONPATH=echo)
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


def test_the_command_is_the_module() -> None:
    assert ftrun("--version").stdout.startswith("ftrun 0.")
    assert compose([]).choices["method"] == "lora"
