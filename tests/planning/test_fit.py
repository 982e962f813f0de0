"""`ftrun fit`: the rates from samples, the choices and why they lost."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ftrun.cli import main
from ftrun.memory.cost import Cost
from ftrun.memory.device import Options
from ftrun.planning.speed import Sample, fitted, from_sheet
from tests.jobs import overrides, tiny_base, write_rows


def test_rates_are_found_again_from_samples() -> None:
    rates = (1e-12, 0.0, 4e-12, 2e-10, 1e-9, 5e-6)
    draw = random.Random(0)
    samples = []
    for _ in range(12):
        cost = Cost(*(draw.uniform(0.2, 1) * 10**size for size in (11, 0, 10, 9, 8, 4)))
        cost = Cost(cost.products16, 0, cost.attention, cost.traffic, cost.dense, cost.calls)
        seconds = sum(r * a for r, a in zip(rates, vars(cost).values(), strict=True))
        samples.append(Sample(cost, seconds))
    found = fitted(samples)
    assert found.error is not None
    assert found.error < 1e-3
    for sample in samples:
        assert found.seconds(sample.cost) == pytest.approx(sample.seconds, rel=1e-3)


def test_noise_shows_in_the_error() -> None:
    draw = random.Random(0)
    costs = [Cost(products16=draw.uniform(1, 10) * 1e11, calls=draw.uniform(1, 10) * 1e3) for _ in range(12)]
    noisy = [Sample(c, (c.products16 * 1e-12 + c.calls * 1e-5) * draw.choice((0.7, 1.3))) for c in costs]
    error = fitted(noisy).error
    assert error is not None
    assert 0.1 < error < 0.5


def test_a_makers_figures_say_that_nothing_was_measured() -> None:
    known, unknown = from_sheet(Options(tflops=165, bandwidth=1008)), from_sheet(Options())
    assert known.error is None
    assert "maker" in known.words
    assert "typical" in unknown.words
    work = Cost(products16=1e12, traffic=1e9)
    assert 1e12 / 165e12 < known.seconds(work) < 10 * 1e12 / 165e12


def fit(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, dict]:
    capsys.readouterr()
    code = main(["fit", *line, "format=json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("fit")
    base = tiny_base(folder / "llama", "llama", num_hidden_layers=7)
    return overrides(base, write_rows(folder / "rows.jsonl"), "method=lora", "rank=4", "model.dtype=bfloat16")


@pytest.mark.slow
def test_on_the_device_at_hand_speed_is_measured(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, found = fit(capsys, *line, "quants=[none,nf4]", "checkpointing=all")
    assert code == 0
    assert "checkpointing=0" in found["best"]  # there is room enough, whatever the job says
    assert found["speed"]["error"] is not None
    assert found["choices"][0]["why"] == "as fast as any, nearest to the job"
    assert found["best"] == found["choices"][0]["overrides"]
    rates = [c["tokens_per_s"] for c in found["choices"] if c["fits"]]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[0] >= 0.97 * max(rates)
    assert all(c["why"] for c in found["choices"])
    assert {o.partition("=")[0] for c in found["choices"] for o in c["overrides"]} == {
        "quant",
        "micro_batch",
        "checkpointing",
        "loss_chunk",
    }


@pytest.mark.parametrize("more", ["layers=last:2", "method=prompt"])
@pytest.mark.few(1)
def test_layers_without_anything_to_train_are_not_measured_alone(
    more: str, line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [w for w in line if not (more.startswith("method") and w.partition("=")[0] in ("method", "rank"))]
    code, found = fit(capsys, *words, more, "quants=[none]")
    assert code == 0
    assert found["speed"]["error"] is not None


@pytest.mark.slow
def test_what_does_not_fit_says_so_and_loses(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["model=llama-7b", "method=lora", "rank=8", "seq_len=256", "batch=2"]
    code, found = fit(capsys, *common, "device=12gb", "quants=[none,nf4]", "ranks=[4]")
    assert code == 0
    assert "quant=nf4" in found["best"]
    assert "rank=4" in found["best"]
    lost = [c for c in found["choices"] if "quant=none" in c["overrides"]]
    assert lost
    assert all(c["why"] == "does not fit" and not c["fits"] for c in lost)


def test_the_choice_is_one_that_trains(line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = fit(capsys, *line, "quants=[none]")
    keys = {word.partition("=")[0] for word in found["best"]}
    kept = [w for w in line if w.partition("=")[0] not in (*keys, "eval.max_new_tokens")]
    assert main([*kept, *found["best"], "steps=1", "eval=none", f"out={tmp_path / 'run'}"]) == 0


@pytest.mark.slow
def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["model=llama-7b", "method=lora", "rank=8", "seq_len=64", "batch=1"]
    code, found = fit(capsys, *common, "device=cuda", "device.memory=2GB", "quants=[nf4]")
    assert code == 3
    assert found["best"] is None
    assert main(["fit", *common, "device=cuda", "device.memory=2GB", "quants=[nf4]"]) == 3
    assert "no choice fits" in capsys.readouterr().out
