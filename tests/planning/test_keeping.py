"""The plan of a job that keeps its frozen layers' outputs: exact, of few layers or all, in every epoch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ftrun import assemble
from ftrun.memory.device import resolve
from ftrun.planning.plan import Kept, plan
from ftrun.planning.settle import rows_of_seq_len
from ftrun.planning.twin import Twin
from ftrun.report.plan_text import _head
from ftrun.runs import cache_dir
from ftrun.tasks import shared
from ftrun.tasks import train as train_task
from ftrun.tasks.plan import Planning
from tests.jobs import tiny_base, tiny_job

MEMORY = Kept("memory", 10, 1000, "as asked")

STACKS: list[tuple[str, dict[str, int], list[str], int]] = [
    ("llama", {"num_hidden_layers": 16}, ["method=lora", "layers=last:8"], 0),
    ("llama", {"num_hidden_layers": 16}, ["method=dora", "layers=last:7", "device=24gb", "micro_batch=2"], 7),
    ("llama", {"num_hidden_layers": 17}, ["method=lora", "layers=[3,5,7,9,11,13,15]", "micro_batch=2"], 3),
    ("llama", {"num_hidden_layers": 14}, ["method=full", "layers=last:1", "kernels=reference", "micro_batch=1"], 1),
    ("llama", {"num_hidden_layers": 9}, ["method=lora", "targets=head", "optim=adamw_8bit"], 0),
    ("gemma3_text", {"num_hidden_layers": 37}, ["method=lora", "layers=last:18", "optim=adamw_8bit"], 4),
    ("gpt2", {"n_layer": 14}, ["method=houlsby", "layers=last:6", "optim=lion"], 6),
    ("qwen3_moe", {"num_hidden_layers": 13}, ["method=qlora", "layers=last:6", "targets=attention"], 2),
]


@pytest.mark.parametrize(("family", "sizes", "more", "recomputed"), STACKS)
@pytest.mark.few(3)
def test_few_layers_extended_equal_all_layers(
    family: str, sizes: dict[str, int], more: list[str], recomputed: int, tmp_path: Path
) -> None:
    """Byte for byte, in every instant and every role."""
    tiny_base(tmp_path / family, family, **sizes)
    job = tiny_job(tmp_path, *more, family=family)
    parts = assemble.sketch(job, cache_dir(), print)
    device = resolve(job.device.typed())
    batches = rows_of_seq_len(job)(job.micro_batch if isinstance(job.micro_batch, int) else 4)[0][1]
    few, every = (
        plan(Twin(job, parts, device, whole), device, batches, recomputed, kept=MEMORY) for whole in (False, True)
    )
    assert dataclasses.asdict(few) == dataclasses.asdict(every)
    on_disk = plan(
        Twin(job, parts, device), device, batches, recomputed, kept=dataclasses.replace(MEMORY, where="disk")
    )
    held = few.kept_prefix["bytes"] if device.type == "cpu" else 0
    assert few.peak_bytes - on_disk.peak_bytes == few.at_peak["other"] - on_disk.at_peak["other"] == held
    assert sum(few.at_peak.values()) == few.peak_bytes


WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}
MEASURED = [
    (["method=lora", "micro_batch=8"], "memory", 1),
    (["method=lora", "micro_batch=8"], "memory", 4),
    (["method=lora", "micro_batch=4", "kernels=reference"], "disk", 1),
    (["method=dora", "micro_batch=4", "kernels=reference", "checkpointing=1"], "memory", 5),
    (["method=full", "micro_batch=4", "model.dtype=bfloat16"], "disk", 4),
    (["method=qlora", "micro_batch=8", "model.dtype=bfloat16", "checkpointing=all"], "memory", 3),
]


@pytest.mark.parametrize(("more", "where", "step"), MEASURED)
@pytest.mark.few(2)
def test_a_run_measures_what_was_planned(
    more: list[str], where: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first epoch (2 steps), where the frozen layers run, and in later ones, where they do not."""
    tiny_base(tmp_path / "llama", "llama", num_hidden_layers=4, **WIDE)
    rows = [{"question": "a " * 100, "answer": f"{'b ' * 50} {n}"} for n in range(10, 26)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = shared.settle_keeping

    def settled(*args: Any) -> Any:
        """The same lengths in every step: any is the largest."""
        return dataclasses.replace(own(*args), largest_step=step)

    monkeypatch.setattr(shared, "settle_keeping", settled)
    common = ("layers=last:2", "batch=8", "epochs=3", "eval=none", "data.held_out=0", "seq_len=384", "log=none")
    train_task.run(tiny_job(tmp_path, *more, *common, f"keep_prefix={where}"))
    memory = json.loads((tmp_path / "run" / "result.json").read_text())["memory"]
    made = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert memory["planned_peak_bytes"] == made["peak_bytes"] > 20e6
    assert abs(memory["error"]) <= 0.005
    assert made["kept_prefix"]["where"] == where
    if where == "memory":
        assert made["at_peak"]["other"] >= made["kept_prefix"]["bytes"] > 5e5
        assert made["steady"]["other"] >= made["kept_prefix"]["bytes"]


def test_a_plan_says_what_is_kept(tmp_path: Path) -> None:
    said: list[str] = []
    tiny_base(tmp_path / "llama", "llama", num_hidden_layers=4)
    made = Planning(tiny_job(tmp_path, "method=lora", "layers=last:2", "epochs=2"), said.append).plan()
    assert made["kept_prefix"]["where"] == "memory"
    assert "keep_prefix: what the first 2 layers give 36 rows is kept in memory" in said[-1]
    head = _head(made).plain
    assert "the first 2 lie below all that trains" in head
    assert "kept from epoch to epoch: what these layers give 36 rows" in head
    said.clear()
    card = Planning(tiny_job(tmp_path, "method=lora", "layers=last:2", "epochs=2", "device=24gb"), said.append).plan()
    assert card["kept_prefix"]["where"] == "memory"
    assert "counted in other" in head
    assert "counted in other" not in _head(card).plain
