"""Weights & Biases: online with a key (WANDB_API_KEY, or netrc), offline without one; WANDB_MODE goes before both."""

from __future__ import annotations

import netrc
import os
import urllib.parse
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.metrics.background import Background
from ftrun.metrics.options import TrackerOptions
from ftrun.metrics.sink import Sink
from ftrun.schema import option

_PATIENCE = 30.0  # seconds for the start, and for the end


@dataclass(frozen=True)
class Options(TrackerOptions):
    package = "wandb"
    install = "wandb"
    entity: str | None = option(None, "the user or team that owns the project; null = your default")
    group: str | None = option(None, "runs of one group are shown together")
    tags: tuple[str, ...] = option((), "labels of the run")


def sink(options: Options, name: str, say: Callable[[str], None]) -> Sink | None:
    """name: the run's. say: takes a line for the user. Files lie in RUN/wandb."""

    def make(run: Path, tell: Callable[[str], None]) -> Any:
        import wandb
        from accelerate.tracking import WandBTracker

        class Announced(WandBTracker):
            def start(self) -> None:
                super().start()
                tell(_where(self.run, run))

        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        return Announced(
            options.project,
            name=name,
            entity=options.entity,
            group=options.group,
            tags=list(options.tags),
            dir=str(run),
            id=_identity(run),
            resume="allow",
            mode=mode,
            settings=_settings(wandb.Settings),
        )

    return Background("wandb", make, say, options.every, patience=_PATIENCE)


def has_key() -> bool:
    """Whether W&B can log in without asking: WANDB_API_KEY, or an entry for its host in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and host and netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _settings(kind: Any) -> Any:
    """Quiet, bounded in time, and without what might hold a secret: code, git state, the command line."""
    wanted = {
        "silent": True,
        "console": "off",
        "init_timeout": _PATIENCE,
        "finish_timeout": _PATIENCE,
        "disable_git": True,
        "disable_code": True,
        "x_disable_meta": True,
    }
    return kind(**{k: v for k, v in wanted.items() if k in kind.model_fields})


def _identity(run: Path) -> str:
    """The run's id at W&B, kept in its folder: a run that goes on goes on there as well."""
    file = run / "wandb" / "id"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _where(run: Any, folder: Path) -> str:
    if getattr(run, "offline", False):
        return f"wandb: offline; `wandb sync {folder / 'wandb'}/offline-run-*` sends it later"
    return f"wandb: {run.url}" if run.url else "wandb: on"
