"""One of several processes at a job: `python -m ftrun.tasks.rank RUN JOB`, started by torch's launcher.

It reads the job as it was composed once; Hydra has had its say. The first rank plans and speaks; the others learn
from it what `auto` came to. train/launch.py starts it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from ftrun.errors import Interrupted, RunFailed, UserError
from ftrun.job import Job, make_job
from ftrun.tasks.channel import die_with_parent


def freeze(job: Job, path: Path) -> None:
    """The composed job, whole, in a file that its user alone can read: what secrets it holds are in it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        yaml.safe_dump({"choices": job.choices, **job.tree}, file, sort_keys=False, allow_unicode=True)


def frozen(path: Path) -> Job:
    """What `freeze` wrote."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    choices = tree.pop("choices")
    return make_job(tree, choices, borrowed=set(tree))


def main(run: Path, told: Path) -> int:
    """This rank's share of the run; returns the exit code, the message of a failure left for the launcher."""
    parent = os.environ.get("FTRUN_PARENT")
    die_with_parent(int(parent) if parent else None)
    try:
        work(run, frozen(told))
    except (UserError, RunFailed, Interrupted) as error:
        return _leave_word(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _leave_word("interrupted", Interrupted.exit_code)
    except Exception as error:  # a library's: the launcher shows one line, log.txt and this stream have the rest
        import traceback

        traceback.print_exc()
        # it may be the echo of another rank's end, whose word then comes first: the clock's seconds are too coarse
        return _leave_word(f"{type(error).__name__}: {error}".splitlines()[0][:500], RunFailed.exit_code, later=1)
    return 0


def _leave_word(message: str, code: int, later: int = 0) -> int:
    """Where torch's launcher looks for it; of several it takes the earliest. later: seconds."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time()) + later}), encoding="utf-8")
    return code


def work(run: Path, job: Job) -> None:
    """Prepare, join the others, train."""
    import torch

    from ftrun.metrics.console import Console
    from ftrun.runs import cache_dir
    from ftrun.tasks.session import Session
    from ftrun.tasks.train import finished
    from ftrun.train.interrupt import terminable
    from ftrun.train.ranks import join

    first = os.environ["RANK"] == "0"
    kind = job.device.options.type
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if kind == "auto" else kind
    if kind == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"devices={job.devices}: this machine has {there} CUDA devices")
        torch.cuda.set_device(local)
    console = Console() if first else Console(file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    with terminable():
        session = Session(job, cache_dir(), console)
        if first:  # what is made once (tokens, a converted base, the plan) the others then find
            console.show(job.as_dict())
            session.prepare(run)
        session.ranks = join(kind)
        if not first:
            session.open(run)
        session.share_settled()
        if not session.ranks.any(first and finished_there(run, job, session.total, finished)):
            _train(session, run)


def finished_there(run: Path, job: Job, total: int, finished: Any) -> bool:
    """Whether the folder's run is at its end."""
    there = yaml.safe_load((run / "job.yaml").read_text(encoding="utf-8"))
    return bool((run / "result.json").is_file() and finished(run, there, job, total))


def _train(session: Any, run: Path) -> None:
    from ftrun.runs import Run
    from ftrun.tasks.train import in_terms, leave_result

    folder = Run(run, False, (), None)  # type: ignore[arg-type]  # held by the process that started us
    try:
        session.close(folder, session.train(folder))
    except BaseException as error:
        told = in_terms(error, session, folder)
        if session.ranks.first:
            leave_result(session, folder, told)
        if told is error:
            raise
        raise told from error


if __name__ == "__main__":
    from ftrun.train.ranks import end

    end(main(Path(sys.argv[1]), Path(sys.argv[2])))
