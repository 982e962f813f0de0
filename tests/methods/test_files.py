"""An adapter's folder, and what is refused in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ftrun.errors import UserError
from ftrun.methods.files import CONFIG, WEIGHTS, load_adapter, peft_targets, save_adapter
from tests.methods.tuned import tuned


def test_tensors_that_share_storage_are_all_written(tmp_path: Path) -> None:
    one = torch.arange(6.0).view(2, 3)
    save_adapter(tmp_path / "deep" / "er", {"r": 2}, {"a": one, "b": one, "c": one.T})
    config, found = load_adapter(tmp_path / "deep" / "er")
    assert config == {"r": 2}
    assert torch.equal(found["b"], one)
    assert torch.equal(found["c"], one.T)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin, a pickle"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_the_system_does_not_give(name: str, tmp_path: Path) -> None:
    save_adapter(tmp_path, {"r": 2}, {"a": torch.zeros(2)})
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=f"{name}: cannot be read: "):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CONFIG).write_text("{"), "not JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), "expected a JSON object"),
        (lambda f: (f / CONFIG).unlink(), f"holds no {CONFIG}"),
        (lambda f: (f / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-4]), "not a safetensors file, or cut short"),
    ],
)
def test_a_damaged_folder_is_named(damage, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save_adapter(tmp_path, {"r": 2}, {"a": torch.ones(4)})
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load_adapter(tmp_path / "elsewhere")


def test_an_adapter_of_another_scale_is_refused(tmp_path: Path) -> None:
    t = tuned("llama", "lora")
    save_adapter(tmp_path, t.tuner.adapter_config(t.anatomy, "base"), t.tuner.state(t.model))
    config, _ = load_adapter(tmp_path)
    with pytest.raises(UserError, match="rank 4 and scale 8 there, rank 4 and scale 4 by this job"):
        tuned("llama", "lora", alpha=16).tuner.check(config)
    with pytest.raises(UserError, match=r"use_dora=False, this job's method=dora True"):
        tuned("llama", "dora").tuner.check(config)
    with pytest.raises(UserError, match="changed the base's weights"):
        t.tuner.check({**config, "init_lora_weights": "pissa_niter_4"})
    # PEFT's users write patterns, not names
    t.tuner.check(
        {**config, "r": 8, "lora_alpha": 64, "rank_pattern": {r"layers\.\d+\..*": 4}, "alpha_pattern": {".*": 32}}
    )


def test_targets_are_short_where_they_are_exact() -> None:
    every = ["m.0.q", "m.0.k", "m.1.q", "m.1.k", "head.q2"]
    assert peft_targets(["m.0.q", "m.1.q"], every) == ["q"]
    assert peft_targets(["m.0.q"], every) == ["m.0.q"]
