"""Runs of a tiny LoRA job that something happens to: at which instant, and what they leave."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftrun.tasks import room
from ftrun.train import loop

LORA = ("method=lora", "rank=4", "lr=1e-2")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def adapter(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    own = loop._count

    def count(progress: loop.Progress, record: Any) -> None:
        own(progress, record)
        if record.step == step:
            act()

    monkeypatch.setattr(loop, "_count", count)


def at_evaluation(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    own = room.evaluate

    def evaluate(model: Any, loss: Any, batches: Any, now: int) -> Any:
        if now == step:
            act()
        return own(model, loss, batches, now)

    monkeypatch.setattr(room, "evaluate", evaluate)


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)
