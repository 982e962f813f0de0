"""Several processes for one job, by torch's elastic launcher: it starts them, watches them, and starts them anew.

On several machines each one's launcher meets the others at `rdzv_endpoint`; inside a Slurm allocation of several nodes
(srun ftrun …) that place, and how many there are, follow from Slurm's environment.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ftrun.errors import DoesNotFit, Interrupted, RunFailed, UserError

_PORT = 29400
_SHUTDOWN = 30  # seconds that workers have to save what they hold when they are asked to stop


@dataclass(frozen=True)
class Nodes:
    """The machines of a job. count: how many; endpoint: where they meet, "" for one. Their order is the meeting's."""

    count: int = 1
    endpoint: str = ""
    key: str = ""  # the same on all of them, another for each job


def nodes_of(nnodes: int | None, endpoint: str | None, environment: Mapping[str, str]) -> Nodes:
    """Where the job's machines meet: as asked for, else as Slurm's environment has it, else this machine alone.

    Raises UserError where several machines are asked for without a place to meet, or a place for one machine alone.
    """
    slurm = _of_slurm(environment)
    count = nnodes or (slurm.count if slurm else 1)
    if count == 1:
        if endpoint:
            raise UserError(f"rdzv_endpoint={endpoint}: has no effect on one machine; give nnodes=2 or more")
        return Nodes()
    place = endpoint or (slurm.endpoint if slurm else "")
    if not place:
        raise UserError(
            f"nnodes={count}: give the place where they meet, the same on each: rdzv_endpoint=HOST:{_PORT}; inside a "
            "Slurm allocation (srun ftrun …) it is found"
        )
    return Nodes(count, place, slurm.key if slurm else re.sub(r"\W", "-", place))


def _of_slurm(environment: Mapping[str, str]) -> Nodes | None:
    """What Slurm says of a step that srun began on several nodes, one task on each. Raises UserError for more of them.

    A batch script is a step of one node, whatever its job has: only srun's tasks have SLURM_STEP_NUM_NODES.
    """
    count, hosts = int(environment.get("SLURM_STEP_NUM_NODES") or 1), environment.get("SLURM_STEP_NODELIST")
    if count < 2 or not hosts:
        return None
    if (tasks := int(environment.get("SLURM_STEP_NUM_TASKS") or count)) != count:
        raise UserError(f"srun: found {tasks} tasks on {count} nodes, expected one on each: srun --ntasks-per-node=1")
    job, step = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_STEP_ID", "0")
    port = _PORT + (int(job) + int(step)) % 1000  # two steps may share a machine
    return Nodes(count, f"{first_host(hosts)}:{port}", f"slurm-{job}-{step}")


def first_host(hosts: str) -> str:
    """The first host of Slurm's list: "gpu[03-05,9],cpu1" -> "gpu03"."""
    first = re.match(r"([^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group(0) if first else hosts)


def launch(
    arguments: Sequence[str],
    processes: int,
    nodes: Nodes = Nodes(),
    max_restarts: int = 0,
    ended: Callable[[], Exception | None] = lambda: None,
) -> None:
    """`python ARGUMENTS` in so many processes on this machine, until all have ended.

    Raises what the first one that failed ended with: UserError (2), DoesNotFit (3), RunFailed (4) or Interrupted
    (130), with its message; RunFailed where one died without a word. The others are ended within seconds. Torch's
    launcher starts all of them anew, `max_restarts` times, where one was lost; not where `ended` has heard from one
    why it ended.
    """
    from torch.distributed.elastic.agent.server.api import SignalException
    from torch.distributed.elastic.multiprocessing import SignalException as Stopped
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what it says of failures, we say in one line
    before = {k: os.environ.get(k) for k in _ENVIRONMENT}
    os.environ.update(_environment(processes))
    try:
        with _handlers_kept():
            elastic_launch(_config(processes, nodes, max_restarts, ended), sys.executable)(*arguments)
    except ChildFailedError as error:
        raise ended() or _told(error) from None
    except RendezvousError as error:
        raise ended() or _not_met(error, nodes) from None
    except (SignalException, Stopped):
        raise Interrupted("interrupted") from None
    finally:
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)


def _config(processes: int, nodes: Nodes, max_restarts: int, ended: Callable[[], Exception | None]) -> Any:
    from torch.distributed.launcher.api import LaunchConfig

    from ftrun.train.rendezvous import BACKEND

    return LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=processes,
        run_id=nodes.key or uuid.uuid4().hex,
        rdzv_backend=BACKEND,
        rdzv_endpoint=nodes.endpoint or "localhost:0",
        rdzv_configs={"ended": ended},
        max_restarts=max_restarts,
        monitor_interval=0.5,
        shutdown_timeout=_SHUTDOWN,
    )


def _not_met(error: Exception, nodes: Nodes) -> Exception:
    """Why the machines' meeting has failed, or has ended before its end."""
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousTimeoutError

    if isinstance(error, RendezvousTimeoutError):
        return UserError(
            f"nnodes={nodes.count}: not all of them came to {nodes.endpoint} in time: is ftrun started on each?"
        )
    if isinstance(error, RendezvousClosedError):
        return RunFailed("another of the job's machines has ended the run, and says why")
    return RunFailed(f"the connection to the job's other machines, at {nodes.endpoint}, is lost: {error}")


_ENVIRONMENT = ("OMP_NUM_THREADS", "FTRUN_PARENT", "FTRUN_ROUND")
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Torch's launcher sets handlers of its own and leaves them behind; after the block there are those of before."""
    if threading.current_thread() is not threading.main_thread():  # nobody hears signals here
        yield
        return
    before = {number: signal.getsignal(number) for number in _HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _environment(processes: int) -> dict[str, str]:
    """What the workers find: threads shared out among them, where nobody said how many; and whom they die with."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // processes))
    return {"OMP_NUM_THREADS": threads, "FTRUN_PARENT": str(os.getpid())}


def _told(error: Exception) -> Exception:
    """The first failure of a worker as ours."""
    place, failure = error.get_first_failure()  # type: ignore[attr-defined]
    code, message = failure.exitcode, failure.message if isinstance(failure.message, str) else ""
    said = message if message and not message.startswith(("<", "Signal", "To enable")) else ""
    if code == Interrupted.exit_code:
        return Interrupted(said or "interrupted")
    if code == DoesNotFit.exit_code:
        return DoesNotFit(said or "the job does not fit the device")
    if code == UserError.exit_code:
        return UserError(said or f"rank {place} refused the job")
    if said and code == RunFailed.exit_code:
        return RunFailed(said)
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return RunFailed(f"the worker of rank {place} {how}. {said}".strip())


def processes_here(devices: int, nodes: Nodes) -> int:
    """The job's processes on this machine. Raises UserError where the machines do not share the devices evenly."""
    if devices % nodes.count:
        raise UserError(f"devices={devices}: expected a multiple of nnodes={nodes.count}: as many on each machine")
    return devices // nodes.count
