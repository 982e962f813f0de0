"""submitit's jobs that are out, and the record by which a study that is started again finds those of Slurm."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import secrets
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftrun.beside import replace_text
from ftrun.runs import read_json

_POLL = 30.0  # seconds between two questions to Slurm's accounting, which does not like to be asked


class Jobs:
    """By task. keeps: whether jobs outlive this process, so that they are on record in jobs.json."""

    def __init__(self, folder: Path, keeps: bool) -> None:
        """folder: submitit's."""
        self.folder, self._path, self._keeps = folder, folder / "jobs.json", keeps
        self.of: dict[str, Any] = {}
        self.tries: Counter[str] = Counter()
        self._names: dict[str, str] = {}
        self._record: dict[str, dict[str, Any]] = (read_json(self._path) or {}) if keeps else {}
        self._asked = 0.0

    def announce(self, ids: Sequence[str], names: Sequence[str]) -> str:
        """Note what is about to be submitted together; returns the comment that these jobs are to carry."""
        token = f"ftrun-{secrets.token_hex(8)}"
        for place, (id, name) in enumerate(zip(ids, names, strict=True)):
            at = place if len(names) > 1 else None
            self._note(name, {"token": token, "place": at, "tries": self.tries[id]})
        return token

    def recall(self) -> None:
        """Find what was submitted by a study that was killed before it had noted the jobs' numbers.

        Those that lack what submitit writes after the submission can do nothing: they are ended.
        """
        unknown = {name: entry for name, entry in self._record.items() if "job" not in entry}
        there = {**_queue(), **_submitted(self.folder)} if unknown else {}
        for name, entry in unknown.items():
            number, place = there.get(entry["token"]), entry["place"]
            self._note(name, None)
            if number is None:
                continue
            job = self._job(number if place is None else f"{number}_{place}")
            if job.paths.submitted_pickle.exists():
                self._note(name, {"job": job.job_id, "tries": entry["tries"]})
            else:
                with contextlib.suppress(OSError):
                    job.cancel(check=False)

    def add(self, id: str, name: str, job: Any) -> None:
        """A job that was submitted. name: its task's file, by which it is found again."""
        self.of[id], self._names[id] = job, name
        self._note(name, {"job": job.job_id, "tries": self.tries[id]})

    def again(self, id: str, name: str, job: Any) -> None:
        """The job of one more attempt."""
        self.tries[id] += 1
        self.add(id, name, job)

    def knows(self, name: str) -> bool:
        """Whether a job of an earlier life is on record for a task's file."""
        return "job" in self._record.get(name, {})

    def adopt(self, id: str, name: str) -> None:
        """Follow the job on record."""
        self.tries[id] = int(self._record[name]["tries"])
        self.of[id], self._names[id] = self._recorded(name), name

    def displace(self, name: str) -> None:
        """End the job on record: another one takes its place."""
        with contextlib.suppress(OSError):
            self._recorded(name).cancel(check=False)
        self._note(name, None)

    def over(self) -> dict[str, str | None]:
        """Jobs that have ended -> None where they came to the end of their task, else what is known of why not."""
        now = time.monotonic()
        ask = self._keeps and bool(self.of) and now - self._asked > _POLL
        if ask:
            self._asked = now
            next(iter(self.of.values())).get_info(mode="force")  # one question answers for all
        return {id: _reason(job) for id, job in self.of.items() if self._is_over(job)}

    def cancel(self, id: str, keep: bool = False) -> None:
        """End a job at once. keep: its place on record stays for the next attempt."""
        job = self.of.get(id)
        if job is not None and self._keeps:
            with contextlib.suppress(OSError):
                job.cancel(check=False)
        elif job is not None:
            end_tree(int(job.job_id))
        if not keep:
            self.remove(id)

    def remove(self, id: str) -> None:
        """A job that is no longer waited for."""
        self.of.pop(id, None)
        self._note(self._names.pop(id, ""), None)

    def _is_over(self, job: Any) -> bool:
        if not self._keeps:
            return bool(job.done())
        if job.paths.result_pickle.exists():
            return True
        return bool(job.watcher.is_done(job.job_id, mode="cache"))

    def _recorded(self, name: str) -> Any:
        return self._job(str(self._record[name]["job"]))

    def _job(self, number: str) -> Any:
        from submitit import SlurmJob

        return SlurmJob(self.folder, number)

    def _note(self, name: str, entry: dict[str, Any] | None) -> None:
        if not self._keeps or (entry is None and name not in self._record):
            return
        self._record = {k: v for k, v in {**self._record, name: entry}.items() if v is not None}
        replace_text(self._path, json.dumps(self._record, indent=1))


def _queue() -> dict[str, str]:
    """The comments of this user's jobs in Slurm's queue -> their numbers (of an array: the array's)."""
    command = ["squeue", "--noheader", "--me", "--format=%F|%k"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return {
        comment.strip(): number.strip() for number, _, comment in (line.partition("|") for line in told.splitlines())
    }


def _submitted(folder: Path) -> dict[str, str]:
    """The same of submitit's files, which are called after their jobs, also of those that have ended."""
    found = {}
    for path in folder.glob("*_submission.sh"):
        comment = re.search(r"^#SBATCH --comment=(.*)$", path.read_text(encoding="utf-8", errors="replace"), re.M)
        if comment is not None:
            found[comment[1].strip()] = path.name.partition("_")[0]
    return found


def end_tree(pid: int) -> None:
    """SIGKILL to a process and all that stem from it."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            process.wait(5)


def _reason(job: Any) -> str | None:
    """None, or why a job that is over did not come to its task's end."""
    path = job.paths.result_pickle
    if not path.exists():
        return f"the job ended without a word ({job.state}); {job.paths.stderr}"
    try:
        status, found = pickle.loads(path.read_bytes())
    except Exception as error:  # what unpickling may raise has no bounds
        return f"{path}: not readable: {type(error).__name__}: {error}"
    if status == "success":
        return None
    last = (str(found).strip().splitlines() or ["no reason is told"])[-1]
    return last.rpartition("AttemptLost: ")[2] or last
