"""scripts/bench: its figures, what it watches, the floor's count, and that both sides see the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import figures, floor, patterns, sides, words
from scripts.bench.cases import CASES, USUAL, WARM, Side
from scripts.bench.figures import Run
from scripts.bench.watch import Failed, watch

ROOT = Path(__file__).parents[2]
STEPS = 3


def _run(side: str, rate: float, peak: float, held_out: dict[int, float] | None = None) -> Run:
    return Run(side, 0, [100, 100], [1.0, 2.0], int(peak), 3.0, rate, held_out=held_out or {})


# --- figures ---


def test_the_rate_counts_what_follows_the_first_steps_and_leaves_out_the_step_after_a_checkpoint() -> None:
    tokens, ends = [10, 20, 30, 40, 50], [5.0, 7.0, 8.0, 12.0, 13.0]
    assert figures.rate(tokens, ends, WARM) == pytest.approx((30 + 40 + 50) / (13 - 7))
    assert figures.rate(tokens, ends, WARM, saved=[3]) == pytest.approx((30 + 50) / (1 + 1))
    with pytest.raises(ValueError):
        figures.rate(tokens[:2], ends[:2], WARM)


def test_steps_to_a_loss_lie_on_the_line_between_the_known_ones() -> None:
    known = {0: 3.0, 4: 2.0, 8: 1.0}
    assert figures.steps_to(1.5, known) == 6
    assert figures.steps_to(2.0, known) == 4
    assert figures.steps_to(3.5, known) == 0
    assert figures.steps_to(0.5, known) == 8
    assert figures.steps_to(1.4, {0: 1.5, 4: 1.6, 8: 1.2}) == pytest.approx(6)


def test_ratios_are_taken_by_pairs_and_the_table_holds_them() -> None:
    ours = [_run("ftrun", 40, 1e9, {0: 3.0, 2: 2.0}), _run("ftrun", 60, 2e9), _run("ftrun", 50, 1e9)]
    other = [_run("trl", 10, 4e9, {0: 3.0, 2: 2.1}), _run("trl", 10, 4e9), _run("trl", 25, 4e9)]
    found = figures.summary(CASES["lora"], ours, other)
    assert found["speed"] == {"median": 4.0, "min": 2.0, "max": 6.0}
    assert found["memory"]["median"] == 0.25
    assert found["held_out_difference"] == pytest.approx(2.0 / 2.1 - 1)
    # the higher loss is the level: ours is there after 1.8 steps of 100 tokens at 50 a second, the other after 2 at 10
    assert found["seconds_to_level"] == pytest.approx([3.6, 20.0])
    table = figures.table({"lora": found, "last8": figures.summary(CASES["last8"], ours[1:], other[1:])}).splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[0].startswith("| case  | tokens/s | against | ratio ")
    assert "| 4.00 (2.00–6.00) |" in table[2]
    assert "| -4.76% |" in table[2]
    assert table[3].rstrip(" |").endswith("(0.25–0.50)")
    assert "seconds to 2.1000 nats × 0.18" in words.ratios(found)


def test_messages_that_overlap_count_once_and_their_share_is_told() -> None:
    from scripts.bench import ranks, wire

    assert wire.union([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0
    assert wire.union([]) == 0.0
    ratio = {"median": 0.5, "min": 0.4, "max": 0.6}
    text = ranks.line("ddp", ratio, {"messages": 2.0, "share": 0.25, "wire_s": 0.05, "profiled_s": 0.2})
    assert "ddp, against one: × 0.50 (0.40–0.60); 2 messages a step, under way in 25.0% of it (50 of 200 ms)" in text


def test_processes_that_come_to_other_losses_are_no_comparison() -> None:
    from scripts.bench import ranks

    ranks._same([2.0, 1.0], [2.001, 1.0], "ddp")
    with pytest.raises(Failed, match=r"ddp: a step.s loss is 50\.0% off"):
        ranks._same([2.0, 1.0], [2.0, 1.5], "ddp")


def test_every_usual_case_is_one_and_says_what_it_is() -> None:
    assert set(USUAL) <= set(CASES)
    assert str(CASES["qlora-ckpt"].other) == "trl lora nf4 recomputed"
    assert replace(CASES["lora"], epochs=2).first(12) == 12


def test_the_words_for_a_step_and_its_floor() -> None:
    step: dict[str, Any] = {"profiled_s": 2.0, "seconds": [1.5, 1.6], "rest": {"aten::mul": 0.5}, "tokens": 1000.0}
    step |= {"kinds": dict.fromkeys(patterns.ORDER, 0.25), "operations": {"head": 1e12}, "products_per_s": 2e12}
    step["floor_s"] = 0.5
    text = words.breakdown("ftrun lora", step)
    assert "matrix products        0.250 s   12.5%" in text
    assert "aten::mul 25.0%" in text
    found = {"summary": {"tokens_per_s": [1000.0, 500.0], "speed": {"median": 1.8}}, "step_of_ours": step}
    found |= {"ours": [{"side": "ftrun lora"}], "other": [{"side": "ftrun"}]}
    assert "1.000 GFLOP a token at 2.00 TFLOP/s; reached: 50.0%" in words.counts(found)
    found["step_of_other"] = {**step, "operations": {"head": 2e12}}
    assert "ratio of speeds: 2.000; measured / counted: 0.900" in words.counts(found)


# --- watching ---


def _watched(tmp_path: Path, code: str) -> Any:
    command = [sys.executable, "-c", code]
    return watch(command, tmp_path / "lines", tmp_path / "log", tmp_path, dict(os.environ))


def test_a_peak_counts_that_the_process_itself_takes_back(tmp_path: Path) -> None:
    seen = _watched(
        tmp_path,
        "import time\nb = bytearray(300 << 20)\ntime.sleep(0.2)\ndel b\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "f = open('lines', 'w')\nfor n in range(3): time.sleep(0.1); print(n, file=f, flush=True)\n",
    )
    assert 300 << 20 < seen.peak < 400 << 20
    assert len(seen.ends) == 3
    assert 0.05 < seen.ends[1] - seen.ends[0] < seen.seconds


def test_a_failed_program_is_told_of_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"exit code 3(.|\n)*alas"):
        _watched(tmp_path, "import sys; print('alas'); sys.exit(3)")


# --- the breakdown and the floor ---


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["aten::mm"], "matrix products"),
        (["aten::copy_", "aten::linear"], "matrix products"),
        (["mkldnn::_linear_pointwise"], "matrix products"),
        (["aten::mm", patterns.LOSS], "loss"),
        (["aten::mul", "autograd::engine::evaluate_function: _FrozenHeadLossBackward"], "loss"),
        (["aten::_scaled_dot_product_flash_attention_for_cpu"], "attention"),
        (["aten::bmm", "ftrun::packed_attention"], "attention"),
        (["ftrun::cross_entropy"], "loss"),
        (["bitsandbytes::dequantize_4bit", "_LoraBackward"], "dequantisation"),
        (["aten::_fused_adamw_", patterns.OPTIMISER], "optimiser"),
        (["ftrun::rms_norm"], patterns.REST),
        (["aten::mul"], patterns.REST),
        # a layer computed again within attention's backward pass
        (["aten::silu", patterns.LAYER, "ScaledDotProductFlashAttentionForCpuBackward0"], patterns.REST),
    ],
)
def test_an_operation_is_known_by_its_name_and_by_what_it_runs_within(names: list[str], kind: str) -> None:
    assert patterns.classify(names) == kind
    assert kind in patterns.ORDER


def _smollm2(trained: range = range(30), **more: Any) -> floor.Shape:
    sizes = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
    sizes |= {"gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}
    weights = tuple(
        floor.Weight(layer, role, *size, rank=16 if layer in trained else 0)
        for layer in range(30)
        for role, size in sizes.items()
    )
    return floor.Shape(weights, depth=30, heads=576, width=576, vocabulary=49152, **more)


def test_the_floor_is_the_hand_count_of_smollm2() -> None:
    found = floor.operations(_smollm2(), [100, 60], supervised=50)
    qkv, linear, updates = 576 * (576 + 192 + 192), 106_168_320, 4_884_480
    # every layer's parameters forward and for the gradient of the input; the embeddings below the first q, k, v do not
    # train, so that those have none to give
    assert found["frozen weights"] == 160 * (4 * linear - 2 * qkv)
    assert found["updates"] == 160 * (6 * updates - 2 * 16 * 3 * 576)
    assert found["head"] == 4 * 49152 * 576 * 50
    # causal: half of two products forward, of four backward
    assert found["attention"] == 30 * 6 * 576 * (100**2 + 60**2)


def test_below_the_lowest_trained_layer_there_is_the_forward_pass_alone() -> None:
    layer, qkv = 3_538_944, 576 * (576 + 192 + 192)
    last = floor.operations(_smollm2(range(22, 30)), [100], supervised=50)
    assert last["frozen weights"] == 100 * (2 * 30 * layer + 2 * 8 * layer - 2 * qkv)
    assert last["attention"] == (30 * 2 + 8 * 4) * 576 * 100**2


def test_recomputed_layers_and_doras_norms_count() -> None:
    plain = floor.operations(_smollm2(), [100], supervised=50)
    again = floor.operations(_smollm2(recomputed=30), [100], supervised=50)
    assert again["frozen weights"] - plain["frozen weights"] == 100 * 2 * 106_168_320
    assert again["updates"] - plain["updates"] == 100 * 2 * 4_884_480
    dora = floor.operations(_smollm2(dora=True), [100], supervised=50)
    assert dora["updates"] - plain["updates"] == 2 * 16 * 106_168_320


def test_the_rate_of_products_is_measured() -> None:
    shape = floor.Shape((floor.Weight(0, "q", 64, 64, 4),), depth=1, heads=64, width=64, vocabulary=128)
    assert 1e6 < floor.measured_rate(shape, 256, 16) < 1e16


# --- both sides ---


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from tests.families import save_tiny

    folder = tmp_path_factory.mktemp("bench") / "base"
    return save_tiny("llama", folder, dtype=torch.bfloat16, intermediate_size=128, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    rows = [{"question": f"What is {i}\u2028+ {i * i}?", "answer": "so " * (i % 7) + str(i + i * i)} for i in range(80)]
    rows[5] = rows[4]  # a row twice
    rows[6]["answer"] = "long " * 200  # and one that would be cut
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _batches(case: str, folder: Path, base: Path) -> list[Any]:
    """Our batches of each step."""
    from ftrun import assemble, stepping
    from ftrun.compose import compose
    from ftrun.runs import cache_dir

    job = compose(sides.overrides(CASES[case].ours, CASES[case], STEPS, folder, str(base)))
    parts = assemble.sketch(job, cache_dir(), print, whole=True)
    corpus = assemble.rows(job, parts, cache_dir(), print)
    return [stepping.step_batches(job, corpus, job.batch, 0, step)[0] for step in range(STEPS)]


def _ours(batch: Any) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(ids, targets) of each row."""
    real = slice(0, sum(batch.lengths))  # without the filler
    parts = (batch.input_ids[0][real].split(batch.lengths), batch.targets[0][real].split(batch.lengths))
    return {(tuple(ids.tolist()), tuple(targets.tolist())) for ids, targets in zip(*parts, strict=True)}


def _theirs(batch: Any) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    found = set()
    masks = batch.get("attention_mask", [None] * len(batch["input_ids"]))
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], masks, strict=True):
        size = len(ids) if mask is None else int(mask.sum())
        found.add((tuple(ids[:size].tolist()), (*labels[1:size].tolist(), -100)))
    return found


def _peer(name: str, job: dict[str, Any], folder: Path) -> Any:
    """A peer's trainer, as its program makes it."""
    import importlib

    from scripts.bench import peer

    program = importlib.import_module(f"scripts.bench.peer_{name}")
    lines = peer.StepLines(folder / "lines.jsonl")
    return program.trainer(job, peer.base(job["model"], "none"), lines)


@pytest.mark.parametrize(("case", "peer"), [("lora", "trl"), ("full-rows", "hf")])
def test_both_sides_see_the_same_tokens_and_learn_the_same(
    case: str, peer: str, base: Path, data: Path, tmp_path: Path
) -> None:
    from scripts.bench.prepare import prepare

    prepare(CASES[case], STEPS, 8, str(data), tmp_path, str(base))
    facts = json.loads((tmp_path / "facts.json").read_text())
    command = sides.command(CASES[case].other, CASES[case], STEPS, tmp_path, tmp_path / "out", str(base), [])
    (tmp_path / "out").mkdir()
    trainer = _peer(peer, json.loads(command[-1]), tmp_path)
    theirs, ours = list(trainer.get_train_dataloader()), _batches(case, tmp_path, base)
    assert len(theirs) == len(ours) == STEPS
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert _ours(a) == _theirs(b)
        assert (a.tokens, a.supervised) == (facts["tokens"][number], facts["supervised"][number])
        assert case != "full-rows" or set(a.lengths) == {512}
    # and of the optimiser both say the same
    job, args = _job(case, tmp_path, base), trainer.args
    options = job.optim.typed()
    assert (args.learning_rate, args.max_grad_norm, args.weight_decay) == (job.lr, options.clip, options.weight_decay)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (*options.betas, options.eps)
    assert (args.lr_scheduler_type, args.get_warmup_steps(100), options.warmup) == (options.schedule, 0, 0)
    held = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().split("\n") if line]
    assert len(held) == 8


def _job(case: str, folder: Path, base: Path) -> Any:
    from ftrun.compose import compose

    return compose(sides.overrides(CASES[case].ours, CASES[case], STEPS, folder, str(base)))


def test_trl_reads_a_conversation_as_we_do_but_for_the_last_line_end(base: Path, data: Path, tmp_path: Path) -> None:
    from scripts.bench.prepare import prepare

    prepare(CASES["lora"], STEPS, 8, str(data), tmp_path, str(base))
    command = sides.command(CASES["lora"].other, CASES["lora"], STEPS, tmp_path, tmp_path / "out", str(base), [])
    (tmp_path / "out").mkdir()
    talks = [json.loads(line)["messages"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "peer.jsonl").write_text(
        "".join(json.dumps({"prompt": talk[:1], "completion": talk[1:]}) + "\n" for talk in talks)
    )
    trainer = _peer("trl", json.loads(command[-1]), tmp_path)
    end = trainer.processing_class("\n").input_ids
    theirs = {row for batch in trainer.get_train_dataloader() for row in _theirs(batch)}
    ours = {row for batch in _batches("lora", tmp_path, base) for row in _ours(batch)}
    assert theirs == {((*ids, *end), (*targets[:-1], *end, -100)) for ids, targets in ours}


def test_a_step_is_broken_down(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftrun.compose import compose
    from ftrun.metrics.console import Console
    from ftrun.models.forward import TokenLoss
    from ftrun.runs import cache_dir
    from ftrun.tasks.session import Session
    from ftrun.train import recompute
    from scripts.bench import breakdown
    from scripts.bench.prepare import prepare

    monkeypatch.setattr(TokenLoss, "score", TokenLoss.score)  # put back afterwards
    monkeypatch.setattr(recompute, "checkpoint", recompute.checkpoint)
    case = CASES["qlora-ckpt"]
    prepare(case, STEPS, 8, str(data), tmp_path, str(base))
    session = Session(compose(sides.overrides(case.ours, case, STEPS, tmp_path, str(base))), cache_dir(), Console())
    session.prepare(tmp_path / "none")
    shape, counted = breakdown.of_job(session)
    assert shape.recomputed == shape.depth == 2
    assert counted["operations"]["head"] == pytest.approx(4 * 272 * 64 * counted["supervised"])
    found = breakdown.measured(session)
    assert sum(found["kinds"].values()) == pytest.approx(found["profiled_s"], rel=0.05)
    assert all(found["kinds"][kind] > 0 for kind in patterns.ORDER if kind != patterns.OUTSIDE)


def test_a_case_needs_enough_rows(base: Path, data: Path, tmp_path: Path) -> None:
    from ftrun.errors import UserError
    from scripts.bench.prepare import prepare

    with pytest.raises(UserError, match=r"78 rows .* need 88"):
        prepare(CASES["lora"], 5, 8, str(data), tmp_path, str(base))


def test_the_command_line_refuses_what_it_cannot_time() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench"), "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--steps of 4 or more" in done.stderr


def test_further_overrides_are_ours_alone() -> None:
    from scripts.bench.pairs import Asked, more

    asked = Asked(1, 3, 8, None, None, ("micro_batch=4",))
    assert more(CASES["lora"].ours, asked).more == ("micro_batch=4",)
    assert more(CASES["lora"].other, asked) == Side("trl")


# --- several processes ---


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_say_for_how_long_a_message_is_under_way(
    strategy: str, base: Path, data: Path, tmp_path: Path
) -> None:
    from scripts.bench import ranks
    from scripts.bench.prepare import prepare

    prepare(CASES["lora"], STEPS, 8, str(data), tmp_path, str(base))
    side = replace(Side("ftrun"), more=ranks.KINDS[strategy])
    told = {"overrides": sides.overrides(side, CASES["lora"], STEPS, tmp_path, str(base)), "processes": 2}
    command = [sys.executable, "-m", "scripts.bench.wire", json.dumps({**told, "out": str(tmp_path / "out.json")})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["messages"] >= (2 if strategy == "fsdp" else 1)  # fsdp gathers each layer, ddp sums once
    assert 0 < found["wire_s"] < found["profiled_s"]
    assert found["share"] == pytest.approx(found["wire_s"] / found["profiled_s"])
