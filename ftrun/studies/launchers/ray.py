"""Jobs as tasks of a Ray cluster: one of this machine that lives as long as the study, or a running one."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ftrun.errors import RunFailed, UserError
from ftrun.schema import option
from ftrun.studies.attempt import Attempt, AttemptLost
from ftrun.studies.elsewhere import Elsewhere, cores, say, shape
from ftrun.studies.launching import Task
from ftrun.studies.watchman import Watchman

_STEP = 0.05  # of a card: shares are rounded up to it
_CPUS = {"cpu": 2, "cuda": 1}  # of a task, where nobody says
_STORE = 80_000_000  # bytes of Ray's object store: nothing of size goes through it, and less it does not take
# what a worker of another machine gets of this process's environment
_HANDED_ON = ("FTRUN_", "HF_", "TRANSFORMERS_", "WANDB_", "MLFLOW_", "TRACKIO_")


@dataclass(frozen=True)
class Options:
    address: str | None = option(
        None,
        "a running cluster",
        form="auto, HOST:PORT or ray://HOST:PORT, or null for a cluster of this machine alone",
    )
    cpus: float | str = option(
        "auto", "CPUs of a task", gt=0, pattern="auto", form="auto, or a number of CPUs as 2, more than 0"
    )
    gpus: float | str = option(
        "auto",
        "GPUs of a task of one device; several have each a whole one",
        gt=0,
        le=1,
        pattern="auto",
        form="auto, or a share of a GPU as 0.5, 1 or less",
    )
    workers: int | None = option(None, "tasks at once at most; null: as many as the cluster has room for", ge=1)
    retries: int = option(1, "how often a task is tried again whose node or process was lost", ge=0)


class Launcher(Elsewhere):
    """The cluster is started, or connected to, when the first job is planned and ready to go."""

    def __init__(self, options: Options, folder: Path) -> None:
        super().__init__(options, folder)
        if importlib.util.find_spec("ray") is None:
            raise UserError("launcher=ray: Ray is not installed here. Install it by: pip install 'ftrun[ray]'")
        self.other = options.address is not None
        self._refs: dict[Any, str] = {}  # Ray's promises -> task
        self._ray: Any = None
        self._watchman: Watchman | None = None
        self._nodes: list[dict[str, float]] = []
        self._least: dict[str, float] = {}  # what a task has asked for at least so far
        self._told: set[str] = set()

    @property
    def width(self) -> int:
        if self.options.workers is not None:
            return int(self.options.workers)
        if self.other:
            self._connect()
        nodes = self._nodes or [{"CPU": cores()}]
        need = self._least or {"CPU": self._cpus(False)}
        return max(1, sum(min(int(node.get(k, math.inf) // v) for k, v in need.items() if v) for node in nodes))

    def _start(self, tasks: list[Task]) -> list[Task]:
        room = len(tasks) if self.options.workers is None else self.options.workers - len(self._refs)
        for task in tasks[: max(0, room)]:
            self.check_device(task)
            self._connect(task)
            demand = self._demand(task)
            self._least = {k: min(v, self._least.get(k, math.inf)) for k, v in demand.items() if v}
            self._warn(demand)
            path = self.place(task, max(1, int(demand["CPU"])))
            handed_on = {k: v for k, v in os.environ.items() if k.startswith(_HANDED_ON)}
            attempt = Attempt(str(path), os.getcwd(), handed_on, str(path.with_suffix(".log")))
            self._refs[self._submit(attempt, demand)] = task.id
        return tasks[max(0, room) :]

    def _ended(self) -> dict[str, str | None]:
        if not self._refs:
            return {}
        try:
            done, _ = self._ray.wait(list(self._refs), num_returns=len(self._refs), timeout=0)
        except ConnectionError as error:
            raise RunFailed(f"launcher.address={self.options.address}: the cluster is gone: {error}") from error
        return {self._refs.pop(ref): self._reason(ref) for ref in done}

    def _drop(self, task: Task) -> None:
        for ref in [r for r, id in self._refs.items() if id == task.id]:
            self._ray.cancel(ref, force=True)
            del self._refs[ref]

    def _end(self) -> None:
        if self._ray is None:
            return
        for ref in self._refs:
            with contextlib.suppress(Exception):  # a cluster that is gone has nothing left to end
                self._ray.cancel(ref, force=True)
        self._refs.clear()
        self._ray.shutdown()
        self._ray = None
        if self._watchman is not None:
            self._watchman.close()

    # --- the cluster ---

    def _connect(self, task: Task | None = None) -> None:
        """Start the cluster, or connect to the running one. task: the first one of a cluster of this machine."""
        if self._ray is not None:
            return
        _prepare(own=not self.other)
        import ray

        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        before = set(_children())
        try:
            if self.other:
                ray.init(self.options.address, **quiet)
            else:
                ray.init("local", **quiet, include_dashboard=False, **self._machine(task))
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"launcher.address={self.options.address}" if self.other else "launcher=ray"
            hint = "; one that asks for a token: RAY_AUTH_MODE=token, RAY_AUTH_TOKEN" if self.other else ""
            raise UserError(f"{where}: no cluster: {str(error).splitlines()[0]}{hint}") from error
        if not self.other:
            # what Ray starts here dies with this process, but for its agents: they try for a minute to tell of it
            self._watchman = Watchman(set(_children()) - before)
        self._ray = ray
        self._look_round()

    def _look_round(self) -> None:
        """What the nodes of the cluster have."""
        self._nodes = [dict(node["Resources"]) for node in self._ray.nodes() if node["Alive"]]

    def _machine(self, task: Task | None) -> dict[str, Any]:
        """What a cluster of this machine has: its memory is what plans are held against."""
        device = self.devices.get(task.key, {}) if task is not None else {}
        memory = {} if device.get("type") != "cpu" else {"_memory": int(device["usable_bytes"])}
        # its own watch over the machine's memory would end tasks by chance, where they are packed by their plans; and
        # they are what this machine is for
        settings = {"memory_monitor_refresh_ms": 0, "worker_niceness": 0}
        return {"num_cpus": cores(), "object_store_memory": _STORE, "_system_config": settings, **memory}

    def _submit(self, attempt: Attempt, demand: Mapping[str, float]) -> Any:
        retries = self.options.retries
        remote = self._ray.remote(run).options(
            num_cpus=demand["CPU"],
            num_gpus=demand["GPU"],
            memory=demand["memory"] or None,
            max_retries=retries,
            retry_exceptions=[AttemptLost],
        )
        return remote.remote(attempt)

    def _reason(self, ref: Any) -> str | None:
        """None, or why a task that has ended could not tell how."""
        try:
            self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:  # a traceback, its last line the error
            return str(error).strip().splitlines()[-1].rpartition("AttemptLost: ")[2][:300]
        except self._ray.exceptions.RayError as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:300]
        return None

    # --- what a task needs ---

    def _demand(self, task: Task) -> dict[str, float]:
        """Ray's resources: bytes are packed on CPUs, shares of a card on GPUs. What no node has room for gets one to
        itself, and is planned again there: the worker refuses what does not fit.
        """
        cuda = self.on_cuda(task)
        nodes, processes = shape(task)
        if nodes > 1:
            raise UserError(f"nnodes={nodes}: launcher=ray gives a job one node; launcher=slurm gives it several")
        largest = max((int(node.get("memory", 0)) for node in self._nodes), default=0)
        memory = 0 if cuda else min(task.bytes, largest)
        return {"CPU": self._cpus(cuda, processes), "GPU": self._gpus(task, cuda, processes), "memory": memory}

    def _gpus(self, task: Task, cuda: bool, processes: int) -> float:
        """A share of one card, or, of a job of several, whole ones: Ray knows no others."""
        asked = self.options.gpus
        if asked != "auto" and not cuda:
            raise UserError(f"launcher.gpus={asked:g}: the jobs run on CPUs (device); leave it at auto")
        if asked not in ("auto", 1) and processes > 1:
            raise UserError(f"launcher.gpus={asked:g}: a job of devices={processes} takes whole GPUs; leave it at auto")
        if not cuda or processes > 1:
            return float(processes) if cuda else 0.0
        steps = max(1, math.ceil(round(task.share / _STEP, 6)))
        return float(asked) if asked != "auto" else round(min(1.0, steps * _STEP), 2)

    def _cpus(self, cuda: bool, processes: int = 1) -> float:
        """As asked for, or for each of a job's processes so many, as far as a node has them."""
        if self.options.cpus != "auto":
            return float(self.options.cpus)
        largest = max((node.get("CPU", 0) for node in self._nodes), default=cores())
        return min(processes * _CPUS["cuda" if cuda else "cpu"], largest or 1)

    def _warn(self, demand: Mapping[str, float]) -> None:
        """Say once that no node has what a task needs: a cluster that grows may get one, another waits for ever."""
        self._look_round()
        if any(all(node.get(k, 0) >= v for k, v in demand.items()) for node in self._nodes):
            return
        words = f"{demand['CPU']:g} CPUs and {demand['GPU']:g} GPUs"
        if not self.other:
            raise UserError(f"launcher=ray: a task needs {words}, and this machine has not; address= names a cluster")
        if words not in self._told:
            self._told.add(words)
            say(f"warning: no node of the cluster has {words} now: such a task waits until one joins")


def _prepare(own: bool) -> None:
    """Ray's environment, which it reads when it is imported; what the user has set stays. own: a cluster of ours."""
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a task without a GPU of its own sees none
        "RAY_CLIENT_RECONNECT_GRACE_PERIOD": "20",  # seconds that tasks at work outlive a study that came by ray://
    }
    if own and "RAY_AUTH_MODE" not in os.environ:  # else Ray leaves a token in the user's home
        defaults |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    with contextlib.suppress(ImportError):  # it tells of each lost attempt at length on standard output
        from ray._private import worker

        worker.print_to_stdstream = _silent


def _silent(*told: Any, **more: Any) -> None:
    """Print nothing: the attempts are told of by their events."""


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def run(attempt: Attempt) -> None:
    """What Ray's workers run."""
    attempt()
