"""Train the job: plan, assemble, train, evaluate, hand over."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftrun.errors import Interrupted, RunFailed, UserError, is_out_of_memory
from ftrun.job import Job
from ftrun.metrics.console import Console
from ftrun.runs import Run, cache_dir, check_run, differences, open_run, read_json, saved_steps, steps_done

if TYPE_CHECKING:
    from ftrun.tasks.session import Session
    from ftrun.tasks.shared import Shared, Watch
    from ftrun.train.launch import Nodes

# what a disk or its owner refuses; other errors of the system are not the run folder's
_REFUSALS: tuple[int, ...] = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
)
# and a file system that cannot rename, or not within itself
_REFUSALS += (errno.ENOTSUP, errno.ENOSYS, errno.EXDEV)
_SAME = "the same command"  # as messages name what goes on with a run


def run(job: Job) -> int:
    """Train the job and leave its run folder; returns the exit code."""
    carry_out(job, Console())
    return 0


def carry_out(job: Job, console: Console, shared: Shared | None = None, watch: Watch | None = None) -> None:
    """Train the job and leave its run folder, the one that lies there gone on with; raises what went wrong.

    shared: what earlier jobs of this process have made. watch: what a study wants of this one.
    """
    out = Path(job.out) if job.out else Path("runs") / (job.name or default_name(job))
    _check_starts(job)
    if job.devices > 1:
        if on_ranks(job, out, console, watch):
            _evaluate(job, out, console)
        return
    there = check_run(out, job.as_dict(), job.resume)
    if there is not None and finished(out, there, job):
        _make_up(job, out, console)
        return
    cache = cache_dir()
    console.show(job.as_dict())
    _show_folder(job, out, console)
    from ftrun.tasks.card import write_card
    from ftrun.tasks.session import Session

    session = Session(job, cache, console, shared, watch)
    session.prepare(out)
    if there is not None and finished(out, there, job, session.total):
        _make_up(job, out, console)
        return
    folder = open_run(out, job.as_dict(), job.resume)
    try:
        session.close(folder, session.train(folder))
        write_card(folder.path, console.say)
    except BaseException as error:
        told = _with_out(in_terms(error, session, folder), job, out)
        leave_result(session, folder, told)
        if told is error:
            raise
        raise told from error
    finally:
        folder.release()
    del session
    _evaluate(job, out, console)


def _evaluate(job: Job, out: Path, console: Console) -> None:
    """What the job's eval asks for of the run once it is finished, which no fault of an evaluation changes."""
    from ftrun.report.eval_text import render
    from ftrun.tasks.evaluate import at_end

    try:
        found = at_end(job, out, console.say)
    except (UserError, RunFailed, RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        why = str(error).splitlines()[0][:300]
        console.say(f"warning: eval: the run is finished, but not measured to its end: {why}. ftrun eval run={out} is")
        return
    if found is not None:
        console.draw(lambda terminal: render(found, terminal))


def _make_up(job: Job, out: Path, console: Console) -> None:
    """What a process that was killed at a run's very end has left undone."""
    from ftrun.tasks.card import write_card

    left = _undone(job, out)
    if "its card" in left:
        write_card(out, console.say)
    if "its evaluation" in left:
        _evaluate(job, out, console)


def _undone(job: Job, out: Path) -> list[str]:
    """What a finished run has not come to."""
    from ftrun.tasks import card, evaluate

    trained = "blend" not in (read_json(out / "result.json") or {})  # of a blend no training can be told
    card_left = trained and not (out / card.FILE).exists()
    return [*["its card"] * card_left, *["its evaluation"] * evaluate.undone(job, out)]


def on_ranks(job: Job, out: Path, console: Console, watch: Watch | None = None) -> bool:
    """The job in as many processes as it has devices, each of which reads it as it was composed once; returns whether
    the first of them, on this machine, has trained it to its end.

    This process starts them, answers them, and ends as the first of them that failed. The first one holds the folder:
    on several machines its is the one that counts, and nobody knows before they meet where it is.
    """
    from ftrun.tasks.desk import Desk
    from ftrun.train.launch import launch, processes_here

    nodes = _nodes(job, watch)
    processes = processes_here(job.devices, nodes)
    if nodes.count == 1:
        there = check_run(out, job.as_dict(), job.resume)
        if there is not None and finished(out, there, job):
            _make_up(job, out, console)
            return False
        _show_folder(job, out, console)
    else:
        console.say(f"nodes   {nodes.count} meet at {nodes.endpoint}")
    try:
        with Desk(job, watch) as desk:
            command = ["-m", "ftrun.tasks.rank", str(out), desk.name]
            launch(command, processes, nodes, job.max_restarts, lambda: desk.ended)
    except Interrupted as error:
        saved = saved_steps(out / "checkpoints")
        told = Interrupted(f"interrupted; {_SAME} goes on from step {saved[-1]}") if saved else error
        raise _with_out(told, job, out) from None
    return desk.trained


def _show_folder(job: Job, out: Path, console: Console) -> None:
    """The run's folder, where it is not what the user typed."""
    if not job.out:
        console.say(f"folder  {out}")


def _with_out(error: BaseException, job: Job, out: Path) -> BaseException:
    """The error, where it speaks of the same command, with the folder that this one has to name: one named after the
    time would be another."""
    if job.out or job.name or not isinstance(error, Interrupted | RunFailed) or _SAME not in str(error):
        return error
    return type(error)(str(error).replace(_SAME, f"{_SAME} with out={out}"))


def _nodes(job: Job, watch: Watch | None) -> Nodes:
    """The machines of the job; a study's job has one, wherever the study itself runs."""
    from ftrun.train.launch import nodes_of

    if watch is None:
        return nodes_of(job.nnodes, job.rdzv_endpoint, os.environ)
    if (job.nnodes or 1) > 1:
        raise UserError(f"nnodes={job.nnodes}: each job of a study runs on one machine; train it without -m")
    return nodes_of(1, job.rdzv_endpoint, {})


def default_name(job: Job) -> str:
    """Method, rank and the time: "qlora-r16-20260131-142501"."""
    rank = getattr(job.method.options, "rank", None)
    parts = [job.method.choice, f"r{rank}" if rank else "", time.strftime("%Y%m%d-%H%M%S")]
    return "-".join(p for p in parts if p)


def finished(out: Path, there: Mapping[str, Any], job: Job, total: int | None = None) -> bool:
    """Whether the job in `out` is done; says so. total: the steps that are asked for, once that is known.

    Raises UserError where more steps are done than are asked for, and where a finished run has nothing to go on from.
    """
    total, done = total or job.steps, steps_done(out)
    if total is not None and total < done:
        raise UserError(
            f"out={out}: {done} steps are done there, and this job has {total}: what is learnt cannot be taken back. "
            f"Name another out, or steps={done} or more"
        )
    result = read_json(out / "result.json") or {}
    if result.get("status") != "finished":
        return False
    asked = ("steps", "epochs")
    same = not differences(there, job.as_dict()) and (
        total == done or all(there.get(key) == getattr(job, key) for key in asked)
    )
    if same:
        left = f"Left to do: {', '.join(_undone(job, out))}" if _undone(job, out) else "Nothing to do"
        print(f"{out}: finished, {result.get('steps')} steps; loss {result.get('loss_last')}. {left}")
    elif not saved_steps(out / "checkpoints"):
        raise UserError(f"out={out}: finished after {done} steps, and its checkpoints are gone: name another out")
    return same


def _check_starts(job: Job) -> None:
    """UserError where the base's folder lacks what training needs, or the adapter that it starts from is not there,
    before anything heavy is loaded."""
    from ftrun.models.sources import folder as folders

    start = getattr(job.method.options, "from_", None)
    if start is not None and not Path(start).expanduser().is_dir():
        raise UserError(f"method.from={start}: no such folder; expected an adapter's, as runs/NAME/adapter")
    path = job.model.options.path
    if path is not None and Path(path).expanduser().is_dir():
        folders.read_facts(Path(path).expanduser())
        folders.weight_files(Path(path).expanduser())


def in_terms(error: BaseException, session: Session, folder: Run) -> BaseException:
    """The error in the terms of a run: an interruption, a folder that cannot be written, or itself."""
    if hasattr(session, "keeper"):
        session.keeper.finish()  # a checkpoint that is still being written counts
    done, saved = session.progress.step, saved_steps(folder.checkpoints)
    if isinstance(error, KeyboardInterrupt):
        if not session.began:
            return Interrupted("interrupted before the first step")
        if not saved:
            return Interrupted(f"interrupted after step {done}; no checkpoint is there, {_SAME} begins anew")
        last = "only evaluates and hands over" if saved[-1] >= session.total else f"goes on from step {saved[-1]}"
        return Interrupted(f"interrupted after step {done}; {_SAME} {last}")
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError) and error.errno in _REFUSALS:
        message = f"{error.filename or folder.path}: cannot be written: {error.strerror}"
        return RunFailed(message) if session.began else UserError(message)
    if is_out_of_memory(error):
        from ftrun.tasks.room import less

        at = f"in step {done + 1}" if session.began or done else "before the first step was done"
        peak = session.settled.plan.needed_bytes / 1e9
        said = f"out of memory {at}: {' '.join(str(error).split())[:200]}. Planned: {peak:.2f} GB at the peak"
        return RunFailed(f"{said}. {settings} resume=force needs less" if (settings := less(session)) else said)
    return error


def leave_result(session: Session, folder: Run, error: BaseException) -> None:
    """A result.json of what was done; nothing of a run that never began."""
    outcome = None
    if session.began or isinstance(error, RunFailed):
        status = "interrupted" if isinstance(error, Interrupted) else "failed"
        outcome = {**session.summary(), "status": status, "reason": str(error)}
    with contextlib.suppress(OSError):  # a full disk has been told of
        session.close(folder, outcome)
    if outcome is None:
        folder.discard()
