"""One of several processes at a job: `python -m ftrun.tasks.rank RUN DESK`, started by torch's launcher.

It asks for the job, as it was composed once, at the desk of the process that started it; Hydra has had its say. The
first rank plans, holds the run's folder and speaks; the others learn from it what `auto` came to, and where the folder
is. Which machine it is on, the machines' meeting decides (train/rendezvous.py).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from ftrun.errors import Interrupted, RunFailed, UserError, worded
from ftrun.job import Job, make_job
from ftrun.tasks.channel import die_with_parent
from ftrun.tasks.desk import Caller

_OWN = ("name", "out", "resume", "debug")  # what the first rank's job alone says


def main(run: Path, desk: str) -> int:
    """This rank's share of the run; returns the exit code, the message of a failure left for the launcher."""
    parent = os.environ.get("FTRUN_PARENT")
    die_with_parent(int(parent) if parent else None)
    caller = Caller(desk)
    try:
        work(run, caller)
    except (UserError, RunFailed, Interrupted) as error:
        if not isinstance(error.__cause__, KeyboardInterrupt):  # a signal may be the launcher's, for another rank's end
            caller.ask("ended", code=error.exit_code, message=str(error))
        return _leave_word(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _leave_word("interrupted", Interrupted.exit_code)
    except Exception as error:  # a library's: the launcher shows one line, log.txt and this stream have the rest
        import traceback

        traceback.print_exc()
        code, message = _worded(error)
        # it may be the echo of another rank's end, whose word then comes first: the clock's seconds are too coarse
        return _leave_word(message, code, later=1)
    return 0


def _worded(error: Exception) -> tuple[int, str]:
    """As ftrun.errors has it; what the end of another rank causes here says so."""
    from ftrun.train.ranks import lost_touch

    code, message = worded(error)
    if not lost_touch(error):
        return code, message
    own = os.environ.get("RANK", "?")
    return RunFailed.exit_code, (
        f"rank {own} lost touch with another: that one has ended, or its machine cannot be reached; its own words are "
        f"there ({message})"
    )


def _leave_word(message: str, code: int, later: int = 0) -> int:
    """Where torch's launcher looks for it; of several it takes the earliest. later: seconds."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time()) + later}), encoding="utf-8")
    return code


def work(run: Path, caller: Caller) -> None:
    """Prepare, join the others, train."""
    from ftrun.metrics.console import Console
    from ftrun.runs import Run, cache_dir
    from ftrun.tasks.session import Session
    from ftrun.train.interrupt import terminable
    from ftrun.train.ranks import join

    first = os.environ["RANK"] == "0"
    told = caller.ask("job")
    job = make_job(told["tree"], told["choices"], borrowed=set(told["tree"]))
    kind = _kind(job)
    console = Console() if first else Console(file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    with terminable():
        session = Session(job, cache_dir(), console, watch=caller.watch(told, first))
        folder, trouble = None, None
        try:
            folder = _begin(session, run) if first else None
        except Exception as error:  # the others, who wait on other machines too, end with the same message
            trouble = error
        try:
            session.ranks = join(kind)
            place = _agreed(session, folder, trouble)
        except BaseException:
            if folder is not None:
                folder.discard()
            raise
        if place is None:
            return
        _train(session, folder or Run(Path(place), False, (), None))  # type: ignore[arg-type]  # the first one's
    if first:
        caller.ask("trained")


def _kind(job: Job) -> str:
    """The device's type; a CUDA job's rank takes the card of its number on this machine."""
    import torch

    kind = str(job.device.options.type)
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if kind == "auto" else kind
    if kind == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"devices={job.devices}: this machine has {there} CUDA devices")
        torch.cuda.set_device(local)
    return kind


def _begin(session: Any, run: Path) -> Any:
    """The first rank's start: the run's folder, held; None where the run in it is at its end."""
    from ftrun.runs import check_run, open_run
    from ftrun.tasks.train import finished

    job = session.job
    there = check_run(run, job.as_dict(), job.resume)
    session.console.show(job.as_dict())
    session.prepare(run)  # what is made once (tokens, a converted base, the plan) the others then find
    if there is not None and finished(run, there, job, session.total):
        return None
    return open_run(run, job.as_dict(), job.resume)


def _agreed(session: Any, folder: Any, trouble: Exception | None) -> str | None:
    """Where the run's folder is, once all ranks are ready to train this job; None where it is finished.

    Raises on all ranks what kept one of them from it.
    """
    job, ranks = session.job, session.ranks
    ranks.agree(trouble)
    first = ranks.told([job.as_dict(), str(folder.path.absolute()) if folder else None])
    if first[1] is None:
        return None
    with ranks.together():
        if not ranks.first:
            _check_same(first[0], job, ranks.rank)
            session.open(Path(first[1]))
    session.share_settled()
    return str(first[1])


def _check_same(first: dict[str, Any], job: Job, rank: int) -> None:
    """UserError where another machine's command line made another job of this one."""
    from ftrun.runs import listed

    own = json.loads(json.dumps(job.as_dict(), default=str))
    changed = [key for key in {**first, **own} if key not in _OWN and first.get(key) != own.get(key)]
    if changed:
        shown = listed([(key, first.get(key), own.get(key)) for key in changed])
        where = f"rank {rank} on {socket.gethostname()}"
        raise UserError(f"{where} was given another job than the first rank (there):\n{shown}\nGive each the same line")


def _train(session: Any, folder: Any) -> None:
    from ftrun.tasks.card import write_card
    from ftrun.tasks.train import in_terms, leave_result

    try:
        session.close(folder, session.train(folder))
        if session.ranks.first:
            write_card(folder.path, session.console.say)
    except BaseException as error:
        told = in_terms(error, session, folder)
        if session.ranks.first:
            leave_result(session, folder, told)
        if told is error:
            raise
        raise told from error


if __name__ == "__main__":
    from ftrun.train.ranks import end

    end(main(Path(sys.argv[1]), sys.argv[2]))
