"""Retention, effective rank and latency at the end of whole runs on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ftrun.errors import Interrupted, RunFailed
from ftrun.metrics.console import Console
from ftrun.runs import cache_dir
from ftrun.tasks import train as task
from ftrun.tasks.session import Session
from tests.jobs import tiny_job
from tests.tasks.test_going_on import adapter, after_step, kill, read

SMALL = ("eval.retention=6", "eval.retention_tokens=8")
LORA = ("method=lora", "rank=4", "lr=1e-2", "steps=3", "eval.max_new_tokens=0", *SMALL)
HARD = ("steps=12", "lr=5e-2", "optim.schedule=constant")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that no other test has filled."""
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))


def chosen(*more: str) -> list[str]:
    """The overrides of a small LoRA job, with what `more` says in their place."""
    named = {one.partition("=")[0]: one for one in (*LORA, *more)}
    if named["method"].partition("=")[2] in ("full", "houlsby", "prompt"):
        del named["rank"]
    return list(named.values())


def ran(tmp_path: Path, name: str, *more: str, family: str = "llama") -> dict[str, Any]:
    """result.json of a finished run in tmp_path/name."""
    assert task.run(tiny_job(tmp_path, *chosen(*more), f"out={tmp_path / name}", family=family)) == 0
    return read(tmp_path / name / "result.json")


def texts() -> list[Path]:
    return sorted((cache_dir() / "retention").glob("*.json"))


def scored(found: dict[str, Any]) -> tuple[float, int]:
    return found["retention"]["before"], found["retention"]["tokens"]


# --- retention ---


def test_an_untrained_adapter_loses_nothing(tmp_path: Path) -> None:
    found = ran(tmp_path, "run", "lr=1e-30", "eval.retention=16", "eval.retention_tokens=64")["retention"]
    assert set(found) == {"before", "after", "rise", "tokens"}
    assert found["rise"] == found["after"] - found["before"]
    assert found["rise"] == pytest.approx(0, abs=1e-6)
    kept = read(texts()[0])
    assert len(kept["ids"]) == 16
    assert found["tokens"] == sum(len(row) - 1 for row in kept["ids"]) > 16
    assert max(len(row) for row in kept["ids"]) <= 65


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "houlsby", "full"])
def test_an_adapter_that_does_nothing_yet_is_no_rise_in_16_bits(tmp_path: Path, method: str) -> None:
    """Whichever method wrote the text: beside an adapter, sums are rounded otherwise than without one."""
    more = ("model.dtype=bfloat16", "lr=1e-30", "steps=1")
    ran(tmp_path, "other", *more, "method=prompt")
    found = ran(tmp_path, "run", f"method={method}", *more)["retention"]
    assert found["rise"] == pytest.approx(0, abs=1e-6)
    assert len(texts()) == (2 if method == "qlora" else 1)


@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_a_model_trained_hard_on_other_text_has_lost(
    tmp_path: Path, kernels: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ran(tmp_path, "run", *HARD, f"kernels={kernels}")["retention"]
    assert found["rise"] > 0.1
    said = capsys.readouterr().out
    before, after, rise = (found[k] for k in ("before", "after", "rise"))
    assert f"retention: the base's own text {before:.2f} → {after:.2f} ({rise:+.2f})" in said


@pytest.mark.slow
def test_the_text_is_written_once_whatever_the_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = ran(tmp_path, "a")
    assert "retention: the base wrote 6 rows" in capsys.readouterr().out
    (path,) = texts()
    stamp, content = path.stat().st_mtime_ns, path.read_bytes()
    again = ran(tmp_path, "b", "method=houlsby")
    assert "(from the cache)" in capsys.readouterr().out
    assert scored(again) == pytest.approx(scored(first), abs=1e-5)
    assert (texts(), path.stat().st_mtime_ns) == ([path], stamp)
    path.write_text('{"ids": [[1, "x"]]}')
    assert scored(ran(tmp_path, "c")) == scored(first)
    assert path.read_bytes() == content
    ran(tmp_path, "d", "seed=1", "steps=1")
    ran(tmp_path, "e", "quant=nf4", "steps=1")
    assert len(texts()) == 3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_is_the_same_bit_for_bit(tmp_path: Path, method: str) -> None:
    more = ("method=full",) if method == "full" else ("dropout=0.3",)
    found = {name: ran(tmp_path, name, *more, f"eval.retention={name}") for name in ("0", "6")}
    made = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    assert (tmp_path / "0" / made).read_bytes() == (tmp_path / "6" / made).read_bytes()
    assert found["0"]["retention"] is None
    assert found["6"]["retention"] is not None
    assert found["0"]["eval"] == found["6"]["eval"]


def test_without_evaluation_there_is_none(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, *(one for one in LORA if not one.startswith("eval")), "eval=none")
    assert task.run(job) == 0
    found = read(tmp_path / "run/result.json")
    assert (found["retention"], found["latency"]) == (None, None)
    assert found["effective_rank"]["rank"] == 4
    assert not texts()


def test_without_held_out_rows_there_is_retention(tmp_path: Path) -> None:
    assert ran(tmp_path, "run", "data.held_out=0")["retention"]["tokens"] > 6


def test_a_table_of_positions_ends_the_rows(tmp_path: Path) -> None:
    ran(tmp_path, "run", "eval.retention_tokens=5000", "eval.retention=2", family="gpt2")
    assert 100 < max(len(row) for row in read(texts()[0])["ids"]) <= 256


@pytest.mark.slow
def test_virtual_tokens_stand_before_the_rows_after_training(tmp_path: Path) -> None:
    found = ran(tmp_path, "run", *HARD, "method=prompt", "lr=0.3")["retention"]
    plain = ran(tmp_path, "plain")["retention"]
    assert (found["before"], found["tokens"]) == (pytest.approx(plain["before"], abs=1e-5), plain["tokens"])
    assert abs(found["rise"]) > 1e-3
    # a table that the virtual tokens have a part of
    ran(tmp_path, "long", "method=prompt", "eval.retention_tokens=5000", "eval.retention=2", family="gpt2")
    assert max(len(row) for path in texts() for row in read(path)["ids"]) <= 256 - 20


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "gone"])
def test_a_run_that_goes_on_has_it_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str, kept: bool
) -> None:
    more = ("method=full",) if method == "full" else ()
    whole = ran(tmp_path, "whole", *more)["retention"]
    after_step(monkeypatch, 2, kill(2))
    with pytest.raises(Interrupted):
        ran(tmp_path, "cut", *more)
    monkeypatch.undo()
    monkeypatch.setenv("FTRUN_CACHE", str(tmp_path / "cache"))
    assert read(tmp_path / "cut/result.json")["retention"] is None
    if not kept:
        shutil.rmtree(cache_dir() / "retention")
    capsys.readouterr()
    found = ran(tmp_path, "cut", *more)["retention"]
    if method == "full" and not kept:
        assert found is None
        assert "after step 2 of method=full the base cannot be had back" in capsys.readouterr().out
    else:
        assert found == pytest.approx(whole, abs=1e-6)


def test_an_adapter_that_training_starts_from_is_not_the_base(tmp_path: Path) -> None:
    tuned = ran(tmp_path, "first", *HARD)["retention"]
    shutil.rmtree(cache_dir() / "retention")
    found = ran(tmp_path, "second", f"method.from={tmp_path}/first/adapter", "lr=1e-30")["retention"]
    assert found == pytest.approx(tuned, abs=1e-5)


def test_a_base_that_gives_no_number_is_told(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, *LORA, "eval.before=false")
    file = tmp_path / "llama/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RunFailed, match=r"retention at step 0: loss nan.*the base's own weights"):
        task.run(job)


def test_a_cache_that_takes_nothing_costs_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache_dir()
    (tmp_path / "cache/retention").write_text("a file in its place")
    assert ran(tmp_path, "run")["retention"]["tokens"] > 6
    assert "warning: the base's own text is not kept in" in capsys.readouterr().out


# --- effective rank ---


def test_the_effective_rank_of_each_module(tmp_path: Path) -> None:
    found = ran(tmp_path, "run", "rank=8")["effective_rank"]
    ranks = found["by_module"]
    assert len(ranks) == 14
    assert ranks.keys() >= {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    assert found["rank"] == 8
    assert found["mean"] == pytest.approx(sum(ranks.values()) / 14, abs=1e-4)
    assert 1 <= found["lowest"] == pytest.approx(min(ranks.values()), abs=1e-4)
    assert found["lowest"] < found["highest"] <= 8
    assert ran(tmp_path, "other", "method=houlsby")["effective_rank"] is None


# --- latency ---


@pytest.mark.parametrize("method", ["lora", "qdora", "houlsby", "prompt", "full"])
def test_the_time_of_a_generated_token(tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = ran(tmp_path, "run", f"method={method}", "eval.latency=6")["latency"]
    assert set(found) == {"tokens", "base_ms", "unmerged_ms", "merged_ms", "merges"}
    assert found["tokens"] == 6
    assert min(found["base_ms"], found["unmerged_ms"]) > 0
    assert found["merges"] == (method not in ("houlsby", "prompt"))
    assert (found["merged_ms"] is not None) == found["merges"]
    assert f"a generated token: base {found['base_ms']:.1f} ms, tuned" in capsys.readouterr().out


def test_timing_leaves_the_adapter_as_it_was_trained(tmp_path: Path) -> None:
    timed, plain = ran(tmp_path, "timed", "eval.latency=3"), ran(tmp_path, "plain")
    assert plain["latency"] is None
    assert adapter(tmp_path / "timed") == adapter(tmp_path / "plain")
    assert timed["adapter_bytes"] == plain["adapter_bytes"]
    assert timed["retention"] == plain["retention"]


def test_the_model_is_unmerged_again(tmp_path: Path) -> None:
    one = Session(tiny_job(tmp_path, *LORA, "eval.latency=3"), cache_dir(), Console())
    one.prepare(tmp_path / "run")
    folder = task.open_run(tmp_path / "run", one.job.as_dict(), "auto")
    one.close(folder, one.train(folder))
    folder.release()
    state = one.parts.tuner.state(one.parts.model)
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert state.keys() == saved.keys()
    assert all((state[name] == saved[name]).all() for name in saved)


def test_too_little_memory_to_merge_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ran(tmp_path, "run", "eval.latency=3", "device.memory=100kB", "refuse=false")["latency"]
    assert found["merges"] is True
    assert found["merged_ms"] is None
    assert found["unmerged_ms"] > 0
    assert "latency: not measured merged: the merged layers take" in capsys.readouterr().out


def test_a_base_that_was_trained_away_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("method=full", "eval.latency=3", "eval.retention=0")
    after_step(monkeypatch, 2, kill(2))
    with pytest.raises(Interrupted):
        ran(tmp_path, "run", *more)
    monkeypatch.undo()
    found = ran(tmp_path, "run", *more)["latency"]
    assert found["base_ms"] is None
    assert found["unmerged_ms"] > 0
    assert "latency: not measured of the base" in capsys.readouterr().out


def test_without_a_prompt_there_is_no_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(tmp_path, "a", "eval.latency=3", "data.held_out=0")["latency"] is None
    assert "latency: not measured: no prompt" in capsys.readouterr().out
    assert ran(tmp_path, "b", "eval.latency=3", "data.held_out=0", "eval.prompt=Why")["latency"]["tokens"] == 3


def test_the_keys_are_there_whatever_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_step(monkeypatch, 1, kill(15))
    with pytest.raises(Interrupted):
        ran(tmp_path, "run", "save_every=null")
    found = json.loads((tmp_path / "run/result.json").read_text())
    assert [found[key] for key in ("retention", "effective_rank", "latency")] == [None, None, None]
