"""A worker: tasks one after the other, the base kept and proven unchanged, faults told."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ftrun.runs import read_json
from ftrun.tasks.worker import Worker
from tests.jobs import tiny_job


class Told:
    """A channel whose replies are a list; a verdict of one's own."""

    def __init__(self, go: bool = True) -> None:
        self.replies: list[Mapping[str, Any]] = []
        self.go = go

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is open."""

    def requests(self) -> Iterator[dict[str, Any]]:
        yield from ()

    def send(self, reply: Mapping[str, Any]) -> None:
        self.replies.append(reply)

    def verdict(self, name: str) -> bool:
        return self.go

    def stopped(self) -> bool:
        return False


def request(tmp_path: Path, out: str, *more: str, **fields: Any) -> dict[str, Any]:
    job = tiny_job(tmp_path, "steps=4", "eval.max_new_tokens=0", f"out={tmp_path / out}", *more)
    return {"id": out, "choices": job.choices, "tree": dict(job.tree), **fields}


def test_the_base_is_kept_and_one_that_a_job_has_changed_is_read_again(tmp_path: Path) -> None:
    worker = Worker(Told())
    assert worker.train(request(tmp_path, "one"))["status"] == "finished"
    shelf = worker.shared.shelf
    assert shelf is not None
    held = shelf.bytes
    assert held > 0
    assert "warning" not in worker.train(request(tmp_path, "two", "rank=2"))
    assert shelf.bytes == held
    with torch.no_grad():
        next(iter(shelf._tensors.values())).add_(1)
    told = worker.train(request(tmp_path, "three", "rank=4"))
    assert "changed by this job" in told["warning"]
    assert shelf.bytes == 0
    again = worker.train(request(tmp_path, "four"))
    assert again["status"] == "finished"
    losses = [(read_json(tmp_path / name / "result.json") or {})["loss_last"] for name in ("one", "four")]
    assert losses[0] == losses[1]


def test_full_fine_tuning_takes_no_kept_base_and_leaves_none(tmp_path: Path) -> None:
    worker = Worker(Told())
    worker.train(request(tmp_path, "one"))
    assert worker.train(request(tmp_path, "full", "method=full"))["status"] == "finished"
    assert worker.shared.shelf is not None
    assert worker.shared.shelf.bytes == 0


def test_until_leaves_a_run_that_a_later_task_goes_on_with(tmp_path: Path) -> None:
    worker = Worker(Told())
    whole = worker.train(request(tmp_path, "whole"))
    assert whole["status"] == "finished"
    assert worker.train(request(tmp_path, "parts", until=2, rungs=[2]))["status"] == "paused"
    assert worker.train(request(tmp_path, "parts", until=2, rungs=[2]))["status"] == "paused"  # it is there already
    assert worker.train(request(tmp_path, "parts"))["status"] == "finished"
    files = [tmp_path / n / "adapter" / "adapter_model.safetensors" for n in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_verdict_against_it_ends_a_run(tmp_path: Path) -> None:
    channel = Told(go=False)
    told = Worker(channel).train(request(tmp_path, "one", "eval.every=2", asks=True))
    assert told["status"] == "pruned"
    assert [r["step"] for r in channel.replies if r["event"] == "rung"] == [2]
    assert (read_json(tmp_path / "one" / "result.json") or {})["steps"] == 2


@pytest.mark.slow
def test_several_devices_stop_where_they_are_asked_to(tmp_path: Path) -> None:
    channel, more = Told(), ("devices=2", "eval.retention=0")
    told = Worker(channel).train(request(tmp_path, "one", *more, until=2, rungs=[1, 2], asks=True))
    assert told["status"] == "paused", told
    assert [r["step"] for r in channel.replies if r["event"] == "rung"] == [1, 2]
    assert (read_json(tmp_path / "one" / "result.json") or {})["steps"] == 2


def test_several_machines_are_refused(tmp_path: Path) -> None:
    told = Worker(Told()).train(request(tmp_path, "one", "devices=2", "nnodes=2", "rdzv_endpoint=localhost:29400"))
    assert (told["status"], str(told["reason"])[:9]) == ("invalid", "nnodes=2:")
    told = Worker(Told()).train(request(tmp_path, "two", "devices=2", "rdzv_endpoint=localhost:29400"))
    assert (told["status"], str(told["reason"])[:14]) == ("invalid", "rdzv_endpoint=")


def test_a_signal_in_the_middle_is_no_end(tmp_path: Path) -> None:
    """SIGTERM by somebody else: the trial is left with a checkpoint, and is not taken for done."""

    class Struck(Told):
        def send(self, reply: Mapping[str, Any]) -> None:
            super().send(reply)
            if reply["event"] == "rung":
                os.kill(os.getpid(), signal.SIGTERM)

    told = Worker(Struck()).train(request(tmp_path, "one", "eval.every=2", asks=True))
    assert told["status"] == "stopped"


def test_faults_are_told(tmp_path: Path) -> None:
    worker = Worker(Told())
    assert worker.train(request(tmp_path, "one", "lr=1e30"))["status"] == "diverged"
    unfit = worker.plan(request(tmp_path, "two", "device.memory=1MB", "micro_batch=4", "checkpointing=none"))
    assert (unfit["status"], unfit["fits"]) == ("finished", False)
    assert "does not fit" in unfit["why"] or "needs" in unfit["why"]
    wrong = request(tmp_path, "three")
    wrong["tree"] = {**wrong["tree"], "lr": -1.0}
    assert worker.plan(wrong)["status"] == "invalid"


def test_a_job_of_two_ranks_is_planned_on_half_a_device_and_tells_of_the_whole(tmp_path: Path) -> None:
    worker = Worker(Told())
    alone = worker.plan(request(tmp_path, "one", "micro_batch=2", whole=False))
    both = worker.plan(request(tmp_path, "two", "micro_batch=2", "devices=2", "strategy=ddp", whole=False))
    assert (alone["ranks"], both["ranks"]) == (1, 2)
    assert both["device"] == alone["device"]
