"""Shards that wait in the host's memory: a card's plan counts what is copied to it, and says what the host holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftrun.planning.twin import Twin
from ftrun.tasks.plan import Planning
from tests.jobs import tiny_base, tiny_job

COMMON = ("devices=2", "strategy=fsdp", "batch=2", "micro_batch=1", "checkpointing=all", "data.held_out=0")


def planning(tmp_path: Path, *more: str) -> tuple[Planning, list[str]]:
    """The plan of a model of nine equal layers, and what was said of its engine."""
    said: list[str] = []
    tiny_base(tmp_path / "llama", num_hidden_layers=9)
    made = Planning(tiny_job(tmp_path, *COMMON, *more), said.append)
    return made, [text for text in said if "offload" in text]


def planned(tmp_path: Path, *more: str) -> dict[str, Any]:
    return planning(tmp_path, *more)[0].plan()


def exact(plan: dict[str, Any]) -> int:
    """Bytes at the peak, without what fills blocks of 512."""
    return int(plan["peak_bytes"] - plan["at_peak"]["rounding"])


def test_the_card_holds_no_shard_but_those_of_the_layers_at_hand(tmp_path: Path) -> None:
    common = ("method=qlora", "device=24gb", "targets=qv")
    stays, (made, said) = planned(tmp_path, *common), planning(tmp_path, *common, "offload=true")
    waits = made.plan()
    assert said == []
    assert waits["at_peak"]["weights"] == waits["steady"]["weights"] == 0
    assert waits["host_bytes"] == stays["steady"]["weights"] > 0
    assert stays["host_bytes"] == 0
    for role in ("adapters", "gradients", "optimizer"):  # whole on each device, as they were
        assert waits["steady"][role] == stays["steady"][role]
    # a shard's copy lives no longer than it takes to gather it: the embedding's is the largest
    saved, vocabulary = exact(stays) - exact(waits), 2 * 4 * 64 * 256
    assert stays["steady"]["weights"] - vocabulary < saved <= stays["steady"]["weights"]
    every = Twin(made.job, made.parts, made.device, whole=True, strategy="fsdp")
    lived = every.step(made.settled.batches, made.settled.recomputed)
    assert (lived.host, lived.peak.peak.total) == (waits["host_bytes"], waits["peak_bytes"])


def test_what_trains_is_the_hosts_with_its_gradients_and_its_state(tmp_path: Path) -> None:
    stays = planned(tmp_path, "method=full", "optim=adamw", "device=24gb")
    waits = planned(tmp_path, "method=full", "optim=adamw", "device=24gb", "offload=true")
    weights = stays["steady"]["weights"]
    assert waits["steady"]["weights"] == waits["steady"]["optimizer"] == waits["at_peak"]["gradients"] == 0
    assert waits["host_bytes"] == pytest.approx(4 * weights, rel=0.01)
    paged = planned(tmp_path, "method=full", "optim=paged_adamw_8bit", "device=24gb", "offload=true")
    assert paged["paged_bytes"] == 0  # what lies on the host has left the device already


def test_where_the_device_is_the_host_nothing_is_moved_and_that_is_said(tmp_path: Path) -> None:
    stays, (made, said) = (
        planned(tmp_path, "method=lora", "device=cpu"),
        planning(tmp_path, "method=lora", "device=cpu", "offload=true"),
    )
    assert said == ["warning: offload=true: the device is the host itself: nothing is moved"]
    assert (made.plan()["peak_bytes"], made.plan()["host_bytes"]) == (stays["peak_bytes"], 0)
