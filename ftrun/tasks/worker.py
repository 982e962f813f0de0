"""A process that does one task of a study after another: `python -m ftrun.tasks.worker`, or `… TASK.json` for one.

Requests come on standard input, replies go to standard output, one JSON object a line; a task in a file has its replies
appended to TASK.events.jsonl and reads verdicts from TASK.verdict, so that a shared folder is all it needs.

    {"do": "plan",  "id": …, "choices": {…}, "tree": {…}}    -> {"event": "planned", "id": …, "fits": true, …}
    {"do": "train", …, "until": null, "rungs": [], "asks": false}
                                  -> {"event": "began"}, {"event": "rung", "step", "loss"} …, {"event": "ended", "status"}
    {"do": "verdict", "id": …, "go": true}        {"do": "stop"}

Imports, tokenised rows, plans and the base's weights stay from task to task; the weights are proven unchanged after
each. A fault ends its task alone, or this process with it; it never outlives the one that asks.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ftrun.errors import DoesNotFit, Interrupted, RunFailed, UserError
from ftrun.job import Job, make_job
from ftrun.tasks.channel import Channel, InFiles, OnPipes


def main(arguments: list[str] | None = None) -> int:
    """Serve until the requests end; 0."""
    given = sys.argv[1:] if arguments is None else arguments
    channel = InFiles(Path(given[0])) if given else OnPipes()
    with channel:
        serve(channel)
    return 0


def serve(channel: Channel) -> None:
    """Do what is asked for, in order."""
    worker = Worker(channel)
    for request in channel.requests():
        if threads := request.get("threads"):
            _use(int(threads))
        reply = {"plan": worker.plan, "train": worker.train, "probe": worker.probe}[request["do"]](request)
        channel.send({"id": request["id"], **reply})


class Worker:
    """What the tasks of this process share, and how each is done."""

    def __init__(self, channel: Channel) -> None:
        from ftrun.tasks.shared import Shared

        self.channel, self.shared = channel, Shared(keeps=True, counts=True)

    def plan(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What the job needs, and whether that is there; the plan stays for its training."""

        def made() -> dict[str, Any]:
            from ftrun.tasks.outlook import outlook

            return outlook(_job(request), self.shared, request.get("whole", True))

        status, reason, found = _guarded(made)
        return {"event": "planned", "status": status, "reason": reason, **(found or {})}

    def train(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """A run, from where its folder stands to its end, to `until`, or to where a verdict leaves it."""
        from ftrun.metrics.console import Console
        from ftrun.runs import steps_done
        from ftrun.tasks.shared import Watch
        from ftrun.tasks.train import carry_out

        name, until, asks = request["id"], request.get("until"), request.get("asks")
        job = _job(request)
        if until is not None and steps_done(Path(str(job.out))) >= until:
            return {"event": "ended", "status": "paused", "reason": None}
        self.channel.send({"event": "began", "id": name})
        rungs = frozenset(request.get("rungs") or ())

        def verdict(step: int, loss: float) -> bool:
            if not asks:
                return True
            self.channel.send({"event": "rung", "id": name, "step": step, "loss": loss})
            return self.channel.verdict(name)

        watch = Watch(until, rungs, verdict, self.channel.stopped)
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            status, reason, _ = _guarded(lambda: carry_out(job, Console(file=nowhere), self.shared, watch))
        if status == "stopped" and not self.channel.stopped():
            if watch.pruned:
                status, reason = "pruned", None
            elif until is not None and steps_done(Path(str(job.out))) >= until:
                status, reason = "paused", None  # what else stops a run is a signal: it is not where it was to be
        return {"event": "ended", "status": status, "reason": reason, **self._proof()}

    def probe(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What the gradients of one pass say of each place that the job's method trains."""

        def made() -> dict[str, Any]:
            from ftrun.tasks.probe import probe

            return probe(_job(request), self.shared)

        status, reason, found = _guarded(made)
        return {"event": "ended", "status": status, "reason": reason, "probe": found, **self._proof()}

    def _proof(self) -> dict[str, Any]:
        """Nothing, or what says that a task has changed the base, which is then read again for the next one."""
        gc.collect()  # the model that has ended goes before the next one comes
        shelf = self.shared.shelf
        changed = shelf.changed() if shelf is not None else []
        if not changed:
            return {}
        assert shelf is not None
        shelf.clear()
        return {"warning": f"the base's weights were changed by this job ({changed[0]}); they are read again"}


def _guarded(action: Callable[[], Any]) -> tuple[str, str | None, Any]:
    """(status, reason, what the action gave): every fault becomes a status."""
    try:
        return "finished", None, action()
    except DoesNotFit as error:
        return "does_not_fit", str(error), None
    except UserError as error:
        return "invalid", str(error), None
    except RunFailed as error:
        return ("diverged" if "not finite" in str(error) else "failed"), str(error), None
    except (Interrupted, KeyboardInterrupt) as error:
        return "stopped", str(error) or "interrupted", None
    except Exception as error:
        traceback.print_exc()
        traceback.clear_frames(error.__traceback__)
        return "failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:400], None


def _job(request: Mapping[str, Any]) -> Job:
    return make_job(request["tree"], request["choices"], {}, request["tree"].keys())


def _use(threads: int) -> None:
    import torch

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
