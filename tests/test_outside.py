"""A method from outside the package: one file and one YAML, found by its entry point, and it trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_cli import ftrun

IA3 = '''
"""(IA)3 (Liu et al. 2022, arXiv:2205.05638): a learnt scale on the outputs of the selected linear layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ftrun.kernels.dense import dense_weight, features
from ftrun.methods import base
from ftrun.schema import option
from ftrun.selection import check_targets


@dataclass(frozen=True)
class Options:
    start: float = option(1.0, "value of every scale at the start; 1 = the base itself", gt=0)
    targets: str | list[str] = option("[k_proj,v_proj]", "which weights")
    layers: str | int | list[str | int] = option("all", "which decoder layers")
    dtype: str = option("float32", "dtype of the scales", choices=("float32", "bfloat16"))

    def __post_init__(self) -> None:
        check_targets(self.targets)


class Scaled(base.Wrapper):
    def __init__(self, name, layer, start, dtype):
        super().__init__(name, layer)
        self.start, self.ia3_l = start, base.parameter((features(layer)[1],), layer, dtype)

    def own(self):
        return {"ia3_l": base.Trained("other", self.ia3_l)}

    def reset(self, seed):
        torch.nn.init.constant_(self.ia3_l, self.start)

    def forward(self, x):
        out = self.base(x)
        return out * self.ia3_l.to(out.dtype) if self.enabled else out

    def merged_weight(self):
        return dense_weight(self.base, torch.float32) * self.ia3_l[:, None].float()


class Tuner(base.Tuner):
    def wrap(self, model, anatomy, kernels):
        dtype = getattr(torch, self.options.dtype)
        make = lambda site: Scaled(site.name, model.get_submodule(site.name), self.options.start, dtype)
        return [make(site) for site in anatomy.sites]

    def adapter_config(self, anatomy, base_name):
        return {"peft_type": "IA3", "base_model_name_or_path": base_name}
'''
IA3_YAML = """# @package _global_
# ftrun --config-dir conf method=ia3
targets: [k_proj, v_proj]
layers: all
lr: 3e-3
method:
  kind: ia3
  start: 1.0
  targets: ${targets}
  layers: ${layers}
  dtype: float32
"""


@pytest.fixture(scope="module")
def ia3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distribution as pip would leave it, with a method of its own, and a folder of YAMLs beside it."""
    folder = tmp_path_factory.mktemp("ia3")
    package, info, conf = (
        folder / "site" / "ia3_for_ftrun",
        folder / "site" / "ia3_for_ftrun-1.0.dist-info",
        folder / "conf",
    )
    for made in (package, info, conf / "method"):
        made.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "ia3.py").write_text(IA3)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ia3-for-ftrun\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ftrun.methods]\nia3 = ia3_for_ftrun.ia3\nlost = ia3_for_ftrun.lost\n")
    (conf / "method" / "ia3.yaml").write_text(IA3_YAML)
    (conf / "method" / "lost.yaml").write_text("kind: lost\n")
    (conf / "method" / "never.yaml").write_text("kind: never\n")
    return folder


def test_a_method_from_outside_is_one_file_and_one_yaml(ia3: Path) -> None:
    outside = {"PYTHONPATH": str(ia3 / "site"), "cwd": ia3}
    done = ftrun("--config-dir", "conf", "method=ia3", "targets=[q_proj]", "--cfg", "job", **outside)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["method"]["kind"] == "ia3"
    for typed, said in (
        (["method=ia3", "method.start=0"], "method.start=0: expected a number, more than 0"),
        (["method=ia3", "rank=8"], "method=ia3 has no such option"),
        (["method=lost"], "is not installed"),
        (["method=never"], "'never' is unknown"),
    ):
        done = ftrun("--config-dir", "conf", *typed, **outside)  # type: ignore[arg-type]
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    help_text = ftrun("train", "method=ia3", "--config-dir", "conf", "--help", **outside).stdout  # type: ignore[arg-type]
    assert "method.start=1.0" in help_text


def test_a_method_from_outside_trains(ia3: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from tests.families import save_tiny

    save_tiny("llama", tmp_path / "model")
    rows = [{"prompt": f"What is {n} and {n}?", "completion": f"{2 * n}, I think."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    typed = [
        "model=folder",
        f"model.path={tmp_path}/model",
        "model.dtype=float32",
        "data=jsonl",
        "data.path=rows.jsonl",
    ]
    typed += ["steps=3", "batch=4", "seq_len=64", "lr=1e-2", "device=cpu", "out=run", "eval=none", "method=ia3"]
    outside = {**os.environ, "PYTHONPATH": str(ia3 / "site")}
    command = [sys.executable, "-m", "ftrun", "--config-dir", str(ia3 / "conf"), *typed]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=outside, check=False)
    assert done.returncode == 0, done.stderr
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 4  # k and v in two layers
    assert all(name.endswith("ia3_l") and (tensor != 1).any() for name, tensor in saved.items())
    assert yaml.safe_load((tmp_path / "run" / "job.yaml").read_text())["choices"]["method"] == "ia3"
