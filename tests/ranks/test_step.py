"""A step that two processes share, over gloo, against the same step in one."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftrun.train.launch import launch
from tests.jobs import overrides, tiny_base, write_rows
from tests.ranks import step

CASES = [("lora", "float32"), ("qlora", "float32"), ("full", "float32"), ("lora", "bfloat16")]


@pytest.mark.parametrize(("method", "dtype"), CASES)
@pytest.mark.few(2)
def test_two_processes_give_the_gradients_of_one(tmp_path: Path, method: str, dtype: str) -> None:
    """Rows of unequal lengths, an epoch's last batch of three rows for two ranks of two rows each."""
    base, rows = tiny_base(tmp_path / "llama"), write_rows(tmp_path / "rows.jsonl", count=27)
    common = [o for o in overrides(base, rows, f"method={method}", "epochs=1", "batch=4") if "model.dtype" not in o]
    common += [f"model.dtype={dtype}", "micro_batch=1"]
    step.work(tmp_path / "one", common)
    one = read(tmp_path / "one")
    assert sum(map(len, one["rows"])) == 3
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    launch(["-m", "tests.ranks.step", str(tmp_path / "two"), *common, "devices=2"], 2)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    for strategy in ("ddp", "fsdp"):
        two = read(tmp_path / "two" / strategy)
        assert len(two["rows"]) == 2
        assert two["changed"] == []
        assert two["before"] == two["after"] == one["before"]
        close = 1e-5 if dtype == "float32" else 2e-2
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5 if dtype == "float32" else 1e-3)
        assert one["gradients"].keys() == two["gradients"].keys()
        for name, gradient in one["gradients"].items():
            assert torch.linalg.norm(gradient - two["gradients"][name]) <= close * torch.linalg.norm(gradient), name
        assert two["bytes"] < (0.75 if strategy == "fsdp" else 1.01) * one["bytes"]


def read(folder: Path) -> dict[str, Any]:
    """What the first rank saw."""
    return {**json.loads((folder / "loss.json").read_text()), "gradients": load_file(folder / "gradients.safetensors")}
