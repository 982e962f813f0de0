"""launcher=local with devices that are not here: which worker sees which GPU, and what lies side by side on one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ftrun.errors import UserError
from ftrun.studies.launchers import local
from ftrun.studies.launching import Task

CARD = {"type": "cuda", "name": "a card", "count": 2, "free_bytes": 100, "usable_bytes": 100}


class Told:
    """A worker that is told what to reply."""

    made: list[Told]

    def __init__(self, log: Path, environment: Mapping[str, str]) -> None:
        self.environment, self.sent, self.replies = environment, list[Mapping[str, Any]](), list[dict[str, Any]]()
        self._pipe = os.pipe()
        self.made.append(self)

    def fileno(self) -> int:
        return self._pipe[0]

    def send(self, request: Mapping[str, Any]) -> None:
        self.sent.append(request)

    def tell(self, event: str, **values: Any) -> None:
        self.replies.append({"id": self.sent[-1]["id"], "event": event, **values})
        os.write(self._pipe[1], b"x")

    def receive(self) -> list[dict[str, Any]]:
        os.read(self._pipe[0], 1)
        replies, self.replies = self.replies, []
        return replies

    def end(self) -> None:
        for side in self._pipe:
            os.close(side)

    kill = end


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    Told.made = []
    monkeypatch.setattr(local, "Worker", Told)
    return Told.made


def task(id: str, do: str, devices: int = 1, size: int = 0) -> Task:
    return Task(id, do, id, {"tree": {"devices": devices}}, bytes=size)


def test_the_first_worker_sees_every_gpu_and_each_other_one_its_own(
    tmp_path: Path, workers: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    launcher = local.Launcher(local.Options(workers=1, devices=2), tmp_path)
    for name in ("a", "b", "c"):
        launcher.submit(task(name, "plan"))
    assert [worker.environment for worker in workers] == [{}]  # what it counts is what the machine has
    workers[0].tell("planned", device=CARD)
    assert [event.id for event in launcher.wait(5)] == ["a"]
    launcher.wait(0)
    assert [worker.environment for worker in workers] == [{}, {"CUDA_VISIBLE_DEVICES": "5"}]
    assert [worker.sent[-1]["id"] for worker in workers] == ["b", "c"]
    assert launcher.width == 2
    launcher.close()


def test_fewer_gpus_than_are_asked_for(tmp_path: Path, workers: list[Told]) -> None:
    launcher = local.Launcher(local.Options(workers=1, devices=3), tmp_path)
    launcher.submit(task("a", "plan"))
    workers[0].tell("planned", device=CARD)
    with pytest.raises(UserError, match=r"launcher.devices=3: this machine has 2 of a card"):
        launcher.wait(5)
    launcher.close()


def test_a_job_of_several_devices_has_no_use_for_one_of_them(tmp_path: Path, workers: list[Told]) -> None:
    launcher = local.Launcher(local.Options(devices=2), tmp_path)
    with pytest.raises(UserError, match=r"launcher.devices=2: each job gets one of them, and here is one of devices=4"):
        launcher.submit(task("a", "plan", devices=4))
    assert workers == []
    launcher.close()


def test_jobs_are_side_by_side_as_their_bytes_fit(tmp_path: Path, workers: list[Told]) -> None:
    launcher = local.Launcher(local.Options(workers=3), tmp_path)
    launcher.submit(task("plan", "plan"))
    workers[0].tell("planned", device=CARD)
    launcher.wait(5)
    for name, size in (("a", 60), ("b", 60), ("c", 40)):
        launcher.submit(task(name, "train", size=size))
    assert [worker.sent[-1]["id"] for worker in workers] == ["a", "c"]
    workers[0].tell("ended", status="finished")
    launcher.wait(5)
    launcher.wait(0)
    assert [worker.sent[-1]["id"] for worker in workers] == ["b", "c"]
    launcher.close()
