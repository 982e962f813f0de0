"""The choices of conf/optim, and each one built as the product builds it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
import yaml

from ftrun import schema

ROOT = Path(__file__).parents[2]
CHOICES = sorted(p.stem for p in (ROOT / "conf" / "optim").glob("*.yaml"))


def options(name: str, **changes: Any) -> tuple[str, Any]:
    """The kind of a choice, and its options: the YAML's, with `changes`, checked as the product checks them."""
    values = yaml.safe_load((ROOT / "conf" / "optim" / f"{name}.yaml").read_text())
    kind = values.pop("kind")
    cls = importlib.import_module(f"ftrun.optim.{kind}").Options
    return kind, schema.build(cls, {**values, **changes}, "optim")


def build(
    name: str,
    params: list[torch.nn.Parameter],
    lr: float = 1e-2,
    decay: float = 0.1,
    device: str = "cpu",
    **changes: Any,
) -> torch.optim.Optimizer:
    kind, made = options(name, **changes)
    groups = [{"params": params[:2], "lr": lr, "weight_decay": decay}]
    if params[2:]:
        groups.append({"params": params[2:], "lr": lr / 2, "weight_decay": 0.0})
    return importlib.import_module(f"ftrun.optim.{kind}").build(groups, made, device)
