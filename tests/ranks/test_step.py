"""A step that two processes share, over gloo, against the same step in one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftrun.train.launch import launch
from tests.jobs import overrides, tiny_base, write_rows

CASES = [
    ("lora", "ddp", "float32"),
    ("lora", "fsdp", "float32"),
    ("qlora", "ddp", "float32"),
    ("qlora", "fsdp", "float32"),
    ("full", "ddp", "float32"),
    ("full", "fsdp", "float32"),
    ("lora", "fsdp", "bfloat16"),
]


@pytest.mark.parametrize(("method", "strategy", "dtype"), CASES)
def test_two_processes_give_the_gradients_of_one(tmp_path: Path, method: str, strategy: str, dtype: str) -> None:
    """Rows of unequal lengths, an epoch's last batch of three rows for two ranks of two rows each."""
    base, rows = tiny_base(tmp_path / "llama"), write_rows(tmp_path / "rows.jsonl", count=27)
    common = [o for o in overrides(base, rows, f"method={method}", "epochs=1", "batch=4") if "model.dtype" not in o]
    common += [f"model.dtype={dtype}", "micro_batch=1"]
    one = taken(tmp_path / "one", common, processes=1)
    two = taken(tmp_path / "two", [*common, "devices=2", f"strategy={strategy}"], processes=2)
    assert sum(map(len, one["rows"])) == 3
    assert len(two["rows"]) == 2
    assert two["changed"] == []
    assert two["before"] == two["after"] == one["before"]
    close = 1e-5 if dtype == "float32" else 2e-2
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5 if dtype == "float32" else 1e-3)
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, gradient in one["gradients"].items():
        assert torch.linalg.norm(gradient - two["gradients"][name]) <= close * torch.linalg.norm(gradient), name
    if strategy == "fsdp":
        assert two["bytes"] < 0.75 * one["bytes"]


def taken(folder: Path, arguments: list[str], processes: int) -> dict[str, Any]:
    """What the first of so many processes saw."""
    folder.mkdir()
    command = ["-m", "tests.ranks.step", str(folder), *arguments]
    if processes == 1:
        subprocess.run([sys.executable, *command], check=True, timeout=120)
    else:
        launch(command, processes)
    return {**json.loads((folder / "loss.json").read_text()), "gradients": load_file(folder / "gradients.safetensors")}
