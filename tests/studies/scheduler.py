"""Slurm's commands as far as submitit asks for them, on this machine: what sbatch is given really runs, array, srun
and all, in processes that outlive whoever submitted it. Where a real Slurm is, nothing of this is needed.

    with_slurm(folder) -> the variables under which `sbatch`, `srun`, `sacct`, `squeue`, `scancel`, `scontrol` are found
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "squeue", "scancel", "scontrol")


def with_slurm(folder: Path) -> dict[str, str]:
    """The commands in folder/bin, what they know in folder/state."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir(exist_ok=True)
    for name in COMMANDS:
        file = folder / "bin" / name
        file.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {name} "$@"\n', encoding="utf-8")
        file.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_HERE": str(folder / "state")}


def submissions(folder: Path) -> list[Path]:
    """The files that sbatch was given, in order."""
    return sorted((folder / "state").glob("*.sh"), key=lambda p: int(p.stem))


def sbatch(state: Path, file: str) -> None:
    """Take a file, start its jobs in a session of their own, tell its number."""
    text = Path(file).read_text(encoding="utf-8")
    number = len(list(state.glob("*.sh"))) + 1
    (state / f"{number}.sh").write_text(text, encoding="utf-8")
    array = re.search(r"^#SBATCH --array=0-(\d+)%(\d+)$", text, re.M)
    names = [f"{number}_{k}" for k in range(int(array[1]) + 1)] if array else [str(number)]
    for name in names:
        (state / name).write_text("PENDING")
    command = [sys.executable, "-S", __file__, "run", str(number), array[2] if array else "1", *names]
    with open(os.devnull, "wb") as nowhere:
        subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=nowhere, stderr=nowhere)
    if (state / "kill").exists():  # the one that submits is killed before it hears the number
        (state / "kill").unlink()
        os.kill(os.getppid(), signal.SIGKILL)
    print(f"Submitted batch job {number}")


def run(state: Path, number: str, at_once: str, *names: str) -> None:
    """The daemon: so many jobs at once, each its file by bash."""
    waiting, at_work = list(names), {}
    while waiting or at_work:
        for name in [n for n in waiting if (state / n).read_text() == "CANCELLED"]:
            waiting.remove(name)
        while waiting and len(at_work) < int(at_once):
            name = waiting.pop(0)
            job, _, index = name.partition("_")
            own = {"SLURM_JOB_ID": job, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0"}
            own |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": index} if index else {}
            at_work[name] = subprocess.Popen(
                ["bash", str(state / f"{number}.sh")], env={**os.environ, **own}, start_new_session=True
            )
            (state / f"{name}.pid").write_text(str(at_work[name].pid))
            (state / name).write_text("RUNNING")
        for name, process in list(at_work.items()):
            if process.poll() is not None:
                del at_work[name]
                if (state / name).read_text() == "PENDING":  # asked for once more
                    waiting.insert(0, name)
                elif (state / name).read_text() == "RUNNING":
                    (state / name).write_text("COMPLETED" if process.returncode == 0 else "FAILED")
        time.sleep(0.05)


def srun(state: Path, *arguments: str) -> None:
    """The command, its prints where --output and --error say."""
    rest, said = list(arguments), {}
    while rest[0].startswith("--"):
        flag = rest.pop(0)
        if flag in ("--output", "--error"):
            said[flag] = rest.pop(0)
    job, index = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_TASK_ID", "")
    for number, flag in ((1, "--output"), (2, "--error")):
        path = said[flag].replace("%A", job).replace("%a", index).replace("%j", job).replace("%t", "0")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.execvp(rest[0], rest)


def sacct(state: Path, *arguments: str) -> None:
    """What is known of all jobs."""
    print("JobID|State|NodeList")
    for path in sorted(state.iterdir()):
        if not path.suffix:
            print(f"{path.name}|{path.read_text()}|here")


def squeue(state: Path, *arguments: str) -> None:
    """The number and the comment of every job that waits or is at work."""
    assert "--format=%F|%k" in arguments
    for path in sorted(state.iterdir()):
        if not path.suffix and path.read_text() in ("PENDING", "RUNNING"):
            number = path.name.partition("_")[0]
            comment = re.search(r"^#SBATCH --comment=(.*)$", (state / f"{number}.sh").read_text(encoding="utf-8"), re.M)
            print(f"{number}|{comment[1] if comment else '(null)'}")


def scancel(state: Path, name: str) -> None:
    """End a job."""
    running = (state / name).read_text() == "RUNNING"
    if running or (state / name).read_text() == "PENDING":
        (state / name).write_text("CANCELLED")
    if running:
        os.killpg(int((state / f"{name}.pid").read_text()), signal.SIGKILL)


def scontrol(state: Path, verb: str, name: str) -> None:
    """`scontrol requeue`: the same job once more."""
    assert verb == "requeue"
    (state / name).write_text("PENDING")


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(os.environ["SLURM_HERE"]), *sys.argv[2:])
