"""The plan: the published arithmetic, few layers against all of them, what a run then measures."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftrun import assemble, stepping
from ftrun.compose import compose
from ftrun.memory.device import Options, resolve
from ftrun.planning.cards import paging
from ftrun.planning.plan import Plan, plan, trained_modules
from ftrun.planning.settle import Settled, rows_of_seq_len, settle, settle_sharing, worst_of
from ftrun.planning.twin import Twin
from ftrun.runs import cache_dir
from ftrun.tasks import train as train_task
from tests.jobs import tiny_base, tiny_job

A_CARD = resolve(Options(type="cuda", memory="24GB"), absent=True)


def planned(*overrides: str) -> Plan:
    """The plan of a model of conf/, for rows of seq_len, as `ftrun plan` makes it where no data is at hand."""
    job = compose(overrides)
    parts = assemble.sketch(job, cache_dir(), print)
    device = resolve(job.device.typed())
    return settle(job, Twin(job, parts, device), rows_of_seq_len(job), device, "seq_len").plan


FLOAT32 = ("method=full", "optim=adamw", "model.dtype=float32", "batch=1", "seq_len=64", "device=80gb")


def test_full_training_in_float32_takes_16_bytes_a_parameter() -> None:
    found = planned("model=llama-7b", *FLOAT32)
    weights = 6_738_415_616
    assert found.total_params == found.trainable_params == weights
    parts = [found.at_peak[role] for role in ("weights", "gradients", "optimizer")]
    assert parts == [4 * weights, 4 * weights, 8 * weights]
    assert round(sum(parts) / 1e9, 1) == 107.8
    assert not found.fits


def test_seven_billion_parameters_take_112_gb() -> None:
    sizes = {"hidden_size": 4000, "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32_007}
    sizes |= {"num_hidden_layers": 35, "intermediate_size": 10_723}
    found = planned("model=llama-7b", *FLOAT32, *(f"model.arch.{k}={v}" for k, v in sizes.items()))
    assert found.total_params == 7_000_000_000
    parts = [found.at_peak[role] / 1e9 for role in ("weights", "gradients", "optimizer")]
    assert parts == [28.0, 28.0, 56.0]


def test_lora_of_rank_8_on_q_and_v_of_llama_7b() -> None:
    found = planned("model=llama-7b", "method=lora", "rank=8", "targets=qv", "seq_len=64", "batch=1", "device=24gb")
    assert found.trainable_params == 4_194_304
    assert found.total_params - found.trainable_params == 6_738_415_616


@pytest.mark.parametrize(("double", "bits"), [("true", 4.127), ("false", 4.5)])
def test_bits_of_a_quantised_parameter(double: str, bits: float) -> None:
    job = compose(["model=llama-7b", "method=qlora", f"quant.double_quant={double}", "seq_len=64", "batch=1"])
    parts = assemble.sketch(job, cache_dir(), print)
    twin = Twin(job, parts, A_CARD)
    steady = twin.step(rows_of_seq_len(job)(1)[0][1], 32).steady.by_role
    quantised = sum(math.prod(m.shape) for m in twin.parts.model.modules() if hasattr(m, "parts"))
    plain = 2 * (2 * 32_000 * 4096 + 65 * 4096)  # embeddings, head and norms stay in 16 bits
    stored = steady["weights"] + steady["quant_constants"] - plain
    assert round(8 * stored / quantised, 3 if double == "true" else 1) == bits


def test_65b_fits_48_gb_by_qlora_and_paging() -> None:
    common = ("model=llama-65b", "method=qlora", "rank=64", "seq_len=512", "batch=1", "optim=paged_adamw_32bit")
    found = planned(*common, "device=48gb")
    assert found.fits
    assert found.paged_bytes > 6e9
    assert found.needed_bytes == found.peak_bytes - found.paged_bytes
    assert not planned(*common, "device=40gb").fits


def test_70b_falls_from_140_gb_to_35() -> None:
    common = ("model=llama2-70b", "rank=16", "seq_len=64", "batch=1", "device=80gb")
    whole, quantised = planned("method=lora", *common), planned("method=qlora", *common)
    assert whole.steady["weights"] == pytest.approx(138e9, rel=0.01)
    assert quantised.steady["weights"] + quantised.steady["quant_constants"] == pytest.approx(36.4e9, rel=0.01)
    assert quantised.steady["weights"] == pytest.approx(35e9, rel=0.01)


STACKS = [
    ("llama", {"num_hidden_layers": 9}, ["method=lora", "checkpointing=none"]),
    ("llama", {"num_hidden_layers": 9}, ["method=qlora", "checkpointing=all", "micro_batch=2"]),
    ("llama", {"num_hidden_layers": 16}, ["method=dora", "checkpointing=8", "device=24gb"]),
    ("llama", {"num_hidden_layers": 9}, ["method=full", "optim.engine=foreach", "checkpointing=3", "micro_batch=1"]),
    ("llama", {"num_hidden_layers": 9}, ["method=lora", "kernels=reference", "dropout=0.1", "device=24gb"]),
    ("llama", {"num_hidden_layers": 9}, ["method=full", "model.dtype=bfloat16", "checkpointing=all", "micro_batch=1"]),
    ("llama", {"num_hidden_layers": 14}, ["method=full", "model.dtype=bfloat16", "checkpointing=7", "device=24gb"]),
    ("gpt2", {"n_layer": 12}, ["method=lora", "layers=last:6", "optim=adamw_8bit", "checkpointing=none"]),
    ("gpt2", {"n_layer": 9}, ["method=prompt", "checkpointing=none"]),
    ("gpt_neox", {"num_hidden_layers": 9}, ["method=houlsby", "optim=sgd", "checkpointing=none"]),
    ("gemma3_text", {"num_hidden_layers": 37}, ["method=lora", "targets=[attention,head]", "checkpointing=none"]),
    ("qwen3_moe", {"num_hidden_layers": 9}, ["method=lora", "targets=attention", "checkpointing=all"]),
    ("llama", {"num_hidden_layers": 14}, ["method=lora", "layers=every:2", "checkpointing=none", "device=24gb"]),
    ("llama", {"num_hidden_layers": 7}, ["method=lora", "layers=[1,4]", "optim=adafactor"]),
    ("llama", {"num_hidden_layers": 9}, ["method=qlora", "rank=128", "device=24gb"]),
    ("llama", {"num_hidden_layers": 9}, ["method=qlora", "rank=5", "optim=paged_adamw_32bit", "device=24gb"]),
    ("llama", {"num_hidden_layers": 8}, ["method=dora", "rank=7", "optim=adamw_8bit", "optim.weight_decay=0.1"]),
    ("llama", {"num_hidden_layers": 16}, ["method=lora", "layers=every:2", "optim=paged_lion_8bit", "device=24gb"]),
    ("gemma3_text", {"num_hidden_layers": 37}, ["method=lora", "targets=[attention,head]", "optim=adamw_8bit"]),
    ("gpt2", {"n_layer": 9}, ["method=houlsby", "optim=lion", "checkpointing=all"]),
    ("llama", {"num_hidden_layers": 9}, ["method=full", "optim=paged_adamw_8bit", "device=24gb", "micro_batch=1"]),
    ("llama", {"num_hidden_layers": 9}, ["method=lora", "rank=3", "optim=adamw_8bit", "optim.lora_plus=16"]),
]


@pytest.mark.parametrize(
    ("family", "sizes", "more"), STACKS, ids=lambda v: "-".join(v) if isinstance(v, list) else None
)
@pytest.mark.few(6)
def test_few_layers_extended_equal_all_layers(family: str, sizes: dict, more: list[str], tmp_path: Path) -> None:
    """Byte for byte, in every instant and every role."""
    tiny_base(tmp_path / family, family, **sizes)
    job = tiny_job(tmp_path, *more, family=family)
    parts = assemble.sketch(job, cache_dir(), print)
    device = resolve(job.device.typed())
    rows = job.micro_batch if isinstance(job.micro_batch, int) else 4
    batches = rows_of_seq_len(job)(rows)[0][1]
    layers = {"none": 0, "all": parts.anatomy.depth}.get(str(job.checkpointing), 0)
    layers = job.checkpointing if isinstance(job.checkpointing, int) else layers
    few, every = (plan(Twin(job, parts, device, whole), device, batches, layers) for whole in (False, True))
    assert dataclasses.asdict(few) == dataclasses.asdict(every)


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit", "paged_lion_8bit"])
def test_low_ranks_page(optim: str) -> None:
    """No matrix of rank 8 is large enough alone; a layer's together are. Two ways of counting agree."""
    job = compose(["model=llama-7b", "method=qlora", "rank=8", f"optim={optim}", "device=24gb", "seq_len=64"])
    parts = assemble.sketch(job, cache_dir(), print)
    twin, device = Twin(job, parts, A_CARD), resolve(job.device.typed())
    found, said = plan(twin, device, rows_of_seq_len(job)(1)[0][1], 32), paging(job, twin)
    assert said is not None
    assert (said["tensors"], said["of"], said["trained_tensors"]) == (32, 32, 448)
    weights = {"paged_adamw_8bit": 2, "paged_adamw_32bit": 8, "paged_lion_8bit": 1}
    assert found.trainable_params == 19_988_480
    assert found.paged_bytes == said["bytes"] == weights[optim] * found.trainable_params


def test_a_buffer_that_is_too_small_does_not_page() -> None:
    job = compose(["model=llama-7b", "method=qlora", "rank=4", "targets=qv", "device=24gb", "seq_len=64"])
    twin = Twin(job, assemble.sketch(job, cache_dir(), print), A_CARD)
    said = paging(job, twin)
    assert said is not None
    assert (said["tensors"], said["of"], said["bytes"]) == (0, 32, 0)
    assert plan(twin, resolve(job.device.typed()), rows_of_seq_len(job)(1)[0][1], 32).paged_bytes == 0


def test_weights_that_their_optimiser_needs_whole_are_not_shared_out() -> None:
    plan = SimpleNamespace(fits=False)
    tried: list[str] = []

    def attempt(strategy: str) -> tuple[Any, Settled]:
        tried.append(strategy)
        tuner = SimpleNamespace(switchable="method=lora" in line)
        return SimpleNamespace(strategy=strategy, parts=SimpleNamespace(tuner=tuner)), Settled(1, 0, plan, 0, [])

    for line in (["method=full", "optim=adafactor"], ["method=full"], ["method=lora", "optim=adafactor"]):
        settle_sharing(compose([*line, "devices=2"]), attempt)
    assert tried == ["ddp", "ddp", "fsdp", "ddp", "fsdp"]


def test_a_twin_runs_few_layers_of_a_tall_stack(tmp_path: Path) -> None:
    tiny_base(tmp_path / "llama", "llama", num_hidden_layers=9)
    job = tiny_job(tmp_path, "method=lora")
    twin = Twin(job, assemble.sketch(job, cache_dir(), print))
    twin.step(rows_of_seq_len(job)(4)[0][1], 0)
    fake = [any(type(p.data).__name__ == "FakeTensor" for p in layer.parameters()) for layer in twin.layers]
    assert sum(fake) <= 5


MEASURED = [
    ["method=lora"],
    ["method=qlora", "micro_batch=2"],
    ["method=full"],
    ["method=dora", "rank=5", "optim=paged_adamw_32bit"],
    ["method=full", "optim=adamw_8bit", "seq_len=32", "batch=1"],  # the optimiser's step is the peak
    ["method=lora", "rank=64", "optim=lion", "seq_len=32", "batch=1", "checkpointing=all"],
]


@pytest.mark.parametrize("more", MEASURED, ids="-".join)
@pytest.mark.few(3)
def test_a_run_measures_what_was_planned(more: list[str], tmp_path: Path) -> None:
    job = tiny_job(tmp_path, *more, "steps=6", "eval=none")
    assert train_task.run(job) == 0
    memory = json.loads((tmp_path / "run" / "result.json").read_text())["memory"]
    made = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert memory["planned_peak_bytes"] == made["peak_bytes"] == sum(made["at_peak"].values())
    assert abs(memory["error"]) < 0.02
    assert max(t["bytes"] for t in made["timeline"]) == made["peak_bytes"]
    if "method=full" not in more:
        assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size == made["adapter_bytes"]


def test_modules_are_collapsed_over_equal_layers(tmp_path: Path) -> None:
    tiny_base(tmp_path / "llama", "llama", num_hidden_layers=6)
    job = tiny_job(tmp_path, "method=lora", "rank=4", "layers=1-4", "targets=qv")
    twin = Twin(job, assemble.sketch(job, cache_dir(), print))
    found = trained_modules(twin)
    assert [(m["layers"], m["module"], m["rank"], m["count"]) for m in found] == [
        ("1-4", "self_attn.q_proj", 4, 4),
        ("1-4", "self_attn.v_proj", 4, 4),
    ]
    assert sum(m["parameters"] for m in found) == twin.trained


def test_nothing_of_the_models_size_is_allocated() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planned("model=llama2-70b", "method=qlora", "seq_len=64", "batch=1", "device=80gb")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB
    assert torch.empty(0).device.type == "cpu"


def test_a_layer_that_leaves_something_behind_has_all_layers_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast's cache keeps copies of weights to the end of the forward pass: what lets them go is no layer's pass."""
    tiny_base(tmp_path / "llama", "llama", num_hidden_layers=9)
    job = tiny_job(tmp_path, "method=full", "model.dtype=bfloat16")
    parts = assemble.sketch(job, cache_dir(), print)
    real = torch.autocast

    def caching(*args: object, **options: object) -> torch.autocast:
        return real(*args, **{**options, "cache_enabled": True})  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "autocast", caching)
    twin = Twin(job, parts)
    batches = rows_of_seq_len(job)(4)[0][1]
    found = twin.step(batches, 9)
    assert twin.whole
    assert found.peak.peak.total == Twin(job, parts, whole=True).step(batches, 9).peak.peak.total


def test_the_longest_row_is_found_however_late_it_comes(tmp_path: Path) -> None:
    rows = [{"question": f"{n} why?", "answer": f"so {n}"} for n in range(3000)]
    rows[1234]["answer"] = "so " * 25
    data = tmp_path / "late.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = tiny_job(tmp_path, "method=lora", f"data.path={data}", "batch=1", "data.held_out=0")
    parts = assemble.sketch(job, cache_dir(), print)
    corpus = assemble.rows(job, parts, cache_dir(), print)
    for seed in range(3):
        step, batches = worst_of(dataclasses.replace(job, seed=seed), corpus, 0, 3000)(1)[0]
        assert step == 0 or sum(batches[0].lengths) == int(corpus.train.lengths.max())


def test_the_worst_second_micro_batch_is_planned_too(tmp_path: Path) -> None:
    lengths = [20, 4, 3, 2, 20, 19, 3, 2, 20, 5, 3, 2]
    rows = [{"question": f"{n}" + " a" * size, "answer": "b" * (n % 7 + 1)} for n, size in enumerate(lengths)]
    data = tmp_path / "two.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = tiny_job(tmp_path, "method=lora", f"data.path={data}", "batch=2", "micro_batch=1", "data.held_out=0")
    parts = assemble.sketch(job, cache_dir(), print)
    corpus = assemble.rows(job, parts, cache_dir(), print)
    total = 6
    steps = worst_of(job, corpus, 0, total)(1)
    seconds = [
        int(corpus.train.lengths[stepping.micro_rows(job, corpus, 1, step)[1]].sum()) for step in range(1, total)
    ]
    assert max(batches[1].tokens for _, batches in steps) == max(seconds)
