"""Jobs of a Slurm cluster by submitit, those that are asked for together as one job array; or, without Slurm, by
submitit's local executor."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftrun.beside import replace_text
from ftrun.errors import UserError
from ftrun.memory.sizes import parse_size
from ftrun.schema import option
from ftrun.studies.attempt import Attempt
from ftrun.studies.elsewhere import Elsewhere, Shape, say, shape
from ftrun.studies.jobs import Jobs
from ftrun.studies.launching import Task
from ftrun.studies.worker import COMMAND

_TRAIN = (sys.executable, "-m", "ftrun")
_MOST = 1000  # jobs of an array: Slurm's MaxArraySize is 1001 where nobody has set it
_AT_ONCE = 256  # jobs at once where nobody says: submitit's own limit of an array
_SPARE = 1.1  # of the planned bytes of the host
_HOST = {"cpu": 1 << 30, "cuda": 4 << 30}  # bytes beside them: CUDA's libraries and the files that weights come from


@dataclass(frozen=True)
class Options:
    partition: str | None = option(None, "sbatch --partition; null: the cluster's default")
    account: str | None = option(None, "sbatch --account; null: the user's default")
    time: int | str = option(
        "2h", "a job's time", ge=1, pattern=r"\d+(\.\d+)?(min|h|d)", form="minutes as 90, or time as 90min, 2h, 1d"
    )
    gpus_per_node: int | str = option(
        "auto",
        "GPUs of a job on each node",
        ge=0,
        pattern="auto",
        form="auto (its devices there, none for device=cpu), or a number of GPUs as 1",
    )
    cpus_per_task: int = option(4, "CPUs of a job for each of its devices", ge=1)
    mem: int | str | None = option(None, "memory of a job's host: bytes, 24GB or 24GiB; null: by its plan")
    array: int | None = option(None, "jobs at once at most; null: as many as the cluster takes (1 without Slurm)", ge=1)
    constraint: str | None = option(None, "sbatch --constraint")
    setup: list[str] = option([], "shell lines before the job's command, [a,b]")
    extra: dict[str, Any] = option({}, "more options of sbatch, {qos: high, mail-user: …}")
    cluster: str = option("auto", "where jobs go; auto: Slurm where sbatch is", choices=("auto", "slurm", "local"))
    retries: int = option(1, "how often a job is tried again that was lost, or ran out of its time", ge=0)
    submit: bool = option(True, "false: write the files for sbatch, say the command, and end")

    def __post_init__(self) -> None:
        if "comment" in self.extra:
            raise UserError("launcher.extra: comment is taken: by it a study finds its jobs again")
        if self.mem is not None:
            parse_size(self.mem, "launcher.mem")


class Launcher(Elsewhere):
    """submitit's files go to STUDY/slurm/. Slurm's jobs outlive a study that is killed: it finds them again."""

    def __init__(self, options: Options, folder: Path) -> None:
        super().__init__(options, folder)
        if importlib.util.find_spec("submitit") is None:
            raise UserError("launcher=slurm: submitit is not installed here. Install it by: pip install 'ftrun[slurm]'")
        self._logs = self.folder / "slurm"
        self._cluster = _cluster(options)
        self.other = self._cluster == "slurm"
        self._jobs = Jobs(self._logs, keeps=self.other)
        self._stopped = False

    @property
    def width(self) -> int:
        return int(self.options.array or (_AT_ONCE if self.other else 1))

    @property
    def at_once(self) -> bool:
        return not self.options.submit

    def stop(self) -> None:
        self._stopped = True
        super().stop()

    def _start(self, tasks: list[Task]) -> list[Task]:
        self._tidy()
        for task in tasks:
            self.check_device(task)
        if not self.options.submit:
            self._write(tasks)
        if several := next((s.nodes for s in map(shape, tasks) if s.nodes > 1), None):
            raise UserError(
                f"nnodes={several}: a job that a study follows has one node; launcher.submit=false writes a file for "
                "sbatch that runs it on several"
            )
        self._jobs.recall()
        tasks = [task for task in tasks if not self._adopt(task)]
        room = self._room(len(tasks))
        for batch in self._alike(tasks[:room]):
            self._send(batch)
        return tasks[room:]

    def _ended(self) -> dict[str, str | None]:
        self._tidy()
        over = self._jobs.over()
        lost = [id for id, reason in over.items() if reason is not None]
        if lost:
            self.listen()  # what they told last may be their end
        for id in lost:
            tries = self._jobs.tries[id]
            if self.meeting.is_out(id) and not self._stopped and tries < self.options.retries:
                self._again(id, str(over.pop(id)))
        return over

    def _tidy(self) -> None:
        """Jobs whose tasks have ended are off the record once the study has been told."""
        for id in [id for id in self._jobs.of if not self.meeting.is_out(id)]:
            self._jobs.remove(id)

    def _drop(self, task: Task) -> None:
        self._jobs.cancel(task.id)

    def _end(self) -> None:
        self._tidy()
        if self._stopped or not self.other:  # else they go on, and a study that is started again finds them
            for id in list(self._jobs.of):
                self._jobs.cancel(id)

    # --- submission ---

    def _room(self, asked: int) -> int:
        """How many of the tasks that are asked for go now."""
        out = len(self._jobs.of)
        if self.other and (self.options.array is None or not out):
            return min(asked, _MOST)  # an array holds its own limit
        return min(asked, max(0, self.width - out))

    def _alike(self, tasks: Sequence[Task]) -> list[list[Task]]:
        """By cards or CPUs, and by how many on how many nodes: the jobs of an array ask for the same."""
        kinds: dict[tuple[bool, Shape], list[Task]] = {}
        for task in tasks:
            kinds.setdefault((self.on_cuda(task), shape(task)), []).append(task)
        return list(kinds.values())

    def _send(self, tasks: Sequence[Task]) -> None:
        """One submission, an array where there are several."""
        paths = [self.place(task, self.options.cpus_per_task) for task in tasks]
        comment = self._jobs.announce([task.id for task in tasks], [path.stem for path in paths])
        for task, path, job in zip(tasks, paths, self._submit(tasks, paths, comment), strict=True):
            self._jobs.add(task.id, path.stem, job)

    def _again(self, id: str, reason: str) -> None:
        """A lost job once more, in the same folders."""
        say(f"{self.meeting.run(id)}: {reason}; tried again")
        self._jobs.cancel(id, keep=True)  # the cluster may have it in mind to start it again by itself
        path = self.meeting.path(id)
        (job,) = self._submit([self.tasks[id]], [path], self._jobs.announce([id], [path.stem]))
        self._jobs.again(id, path.stem, job)

    def _submit(self, tasks: Sequence[Task], paths: Sequence[Path], comment: str) -> list[Any]:
        import submitit

        retries = {f"{name}_max_num_timeout": self.options.retries for name in ("slurm", "local")}
        parent = None if self.other else os.getpid()
        try:
            executor = submitit.AutoExecutor(self._logs, self._cluster, **retries)
            sbatch = self._sbatch(tasks)
            if self.other:  # by it a study that is killed now finds its jobs again
                sbatch["comment"] = comment
            executor.update_parameters(
                **{f"slurm_{key}": value for key, value in sbatch.items()},
                timeout_min=sbatch["time"],
                gpus_per_node=sbatch["gpus_per_node"],
                local_setup=self.options.setup or None,
            )
            with _uninterrupted(), executor.batch():
                return [executor.submit(Attempt(str(path), os.getcwd(), parent=parent)) for path in paths]
        except (RuntimeError, OSError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"launcher=slurm: the jobs could not be submitted: {lines[-1]}") from error

    def _adopt(self, task: Task) -> bool:
        """Whether the job of an earlier life of this study does the task."""
        name = self.meeting.file(task).stem
        if not self._jobs.knows(name):
            return False
        if self.meeting.adopt(task, self.request(task, 0)) is None:  # it does something else by the same name
            self._jobs.displace(name)
            return False
        self._jobs.adopt(task.id, name)
        self.tasks[task.id] = task
        return True

    # --- what is asked of Slurm ---

    def _sbatch(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """submitit's names of sbatch's options; None where one is not given.

        A node has one task, which starts the job's processes there.
        """
        options, (nodes, processes) = self.options, shape(tasks[0])
        return {
            "job_name": re.sub(r"[^\w.-]+", "_", f"ftrun-{self.folder.name}"),
            "time": minutes(options.time),
            "nodes": nodes,
            "ntasks_per_node": 1,
            "cpus_per_task": options.cpus_per_task * processes,
            "gpus_per_node": self._gpus(tasks[0]) or None,
            "mem": f"{math.ceil(max(self._host_bytes(task) for task in tasks) / 2**20)}M",
            "partition": options.partition,
            "account": options.account,
            "constraint": options.constraint,
            "array_parallelism": self.width,
            "setup": options.setup or None,
            "additional_parameters": {k: v for k, v in options.extra.items() if v is not None} or None,
        }

    def _gpus(self, task: Task) -> int:
        needed = shape(task).processes if self.on_cuda(task) else 0
        if self.options.gpus_per_node == "auto":
            return needed
        if self.options.gpus_per_node < needed:
            raise UserError(
                f"launcher.gpus_per_node={self.options.gpus_per_node}: expected {needed} or more: a job has that many "
                "devices on a node"
            )
        return int(self.options.gpus_per_node)

    def _host_bytes(self, task: Task) -> int:
        """What a node gives a job: what each of its processes there needs beside what it was planned for."""
        if self.options.mem is not None:
            return parse_size(self.options.mem, "launcher.mem")
        processes, cuda = shape(task).processes, self.on_cuda(task)
        planned = task.bytes * (processes if cuda else 1)  # a card's, or the whole node's
        return math.ceil(_SPARE * planned) + processes * _HOST["cuda" if cuda else "cpu"]

    def _write(self, tasks: Sequence[Task]) -> None:
        """The files that sbatch would be given; ends the study there."""
        parts = [tasks[start : start + _MOST] for start in range(0, len(tasks), _MOST)]
        for number, batch in enumerate((b for part in parts for b in self._alike(part)), start=1):
            words = [self._alone(task) for task in batch]
            command = COMMAND if shape(batch[0]).nodes == 1 else _TRAIN
            file = write(self._logs / f"tasks-{number}.sh", self._sbatch(batch), words, command)
            many = "1 job; its run" if len(batch) == 1 else f"{len(batch)} jobs; their runs"
            print(f"sbatch {shlex.quote(str(file))}    # {many}: {self.folder / 'runs'}")
        raise SystemExit(0)

    def _alone(self, task: Task) -> tuple[str, ...]:
        """What tells a job that nobody follows what to do: its task's file; where it has several nodes, the job's."""
        if shape(task).nodes == 1:
            return (str(self.place(task, self.options.cpus_per_task, by_hand=True)),)
        request, path = self.request(task, 0), self.meeting.file(task).with_suffix(".yaml")
        text = yaml.safe_dump({"choices": request["choices"], **request["tree"]}, sort_keys=False, allow_unicode=True)
        replace_text(path, text, private=True)
        return (f"job={path}", f"out={request['tree']['out']}")


def write(file: Path, sbatch: Mapping[str, Any], words: Sequence[Sequence[str]], command: Sequence[str]) -> Path:
    """A file for sbatch: the lines that submitit writes, and the command, with each job's own words at its end."""
    from submitit.slurm.slurm import SlurmExecutor

    class Writer(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # a file can be written where there is no Slurm

    file.parent.mkdir(parents=True, exist_ok=True)
    if len(words) == 1:
        line = shlex.join([*command, *words[0]])
    else:
        line = shlex.join(command)
        for number, column in enumerate(zip(*words, strict=True), start=1):
            names = file.with_suffix(f".{number}.txt")
            names.write_text("".join(f"{word}\n" for word in column), encoding="utf-8")
            line += f' "$(sed -n $((SLURM_ARRAY_TASK_ID + 1))p {shlex.quote(str(names))})"'
    setup = [*(sbatch["setup"] or ()), f"cd {shlex.quote(os.getcwd())}"]
    writer = Writer(file.parent)
    writer.update_parameters(**{k: v for k, v in {**sbatch, "setup": setup}.items() if v is not None})
    if len(words) > 1:
        writer.parameters["map_count"] = len(words)
    file.write_text(writer._make_submission_file_text(line, ""), encoding="utf-8")
    return file


def minutes(value: int | str) -> int:
    """Whole minutes of 90, "90min", "2h" or "1d", at least one."""
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"([\d.]+)(min|h|d)", value)
    assert match is not None, "the option's pattern"
    return max(1, math.ceil(float(match[1]) * {"min": 1, "h": 60, "d": 1440}[match[2]]))


def _cluster(options: Options) -> str:
    """slurm or local. Raises UserError where Slurm is asked for and is not here."""
    there = shutil.which("sbatch") is not None and shutil.which("srun") is not None
    if not options.submit:
        return "slurm"
    if options.cluster == "slurm" and not there:
        raise UserError("launcher.cluster=slurm: found no sbatch here; launcher.submit=false only writes its files")
    if options.cluster == "auto" and not there:
        say("launcher=slurm: found no sbatch here: submitit runs the jobs on this machine, one after the other")
    return "slurm" if there and options.cluster != "local" else "local"


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """What is started within ignores Ctrl-C of the terminal: this process asks the jobs to stop."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread: nobody hears signals here
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
