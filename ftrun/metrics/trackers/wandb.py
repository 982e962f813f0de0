"""Weights & Biases: online with a key (WANDB_API_KEY, or netrc), offline without one; WANDB_MODE goes before both."""

from __future__ import annotations

import netrc
import os
import socket
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.metrics.background import Background
from ftrun.metrics.options import TrackerOptions
from ftrun.metrics.sink import Sink
from ftrun.schema import option

_REACH = 5.0  # seconds to try to reach the server
_START, _END = 15.0, 10.0  # seconds at most for the start (the run goes on meanwhile), and for the last records


@dataclass(frozen=True)
class Options(TrackerOptions):
    package = "wandb"
    install = "wandb"
    entity: str | None = option(None, "the user or team that owns the project; null = your default")
    group: str | None = option(None, "runs of one group are shown together; null: a study's runs under its name")
    job_type: str | None = option(None, "what a run of the group is; null: train, and trial within a study")
    tags: tuple[str, ...] = option((), "labels of the run")


def sink(options: Options, name: str, say: Callable[[str], None]) -> Sink | None:
    """name: the run's. say: takes a line for the user. Files lie in RUN/wandb."""

    def make(run: Path, tell: Callable[[str], None]) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")  # its log-in speaks before it has seen the settings
        import wandb
        from accelerate.tracking import WandBTracker

        class Announced(WandBTracker):
            def start(self) -> None:
                super().start()
                tell(_where(self.run, run, reason))

        mode, reason = how()
        return Announced(
            options.project,
            name=name,
            entity=options.entity,
            group=options.group,
            job_type=options.job_type or "train",
            tags=list(options.tags),
            dir=str(run),
            id=_identity(run),
            resume="allow",
            mode=mode,
            settings=_settings(wandb.Settings),
        )

    return Background("wandb", make, say, options.every)


def how() -> tuple[str, str]:
    """The mode that the run is logged in, and why."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"], "WANDB_MODE says so"
    server = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if not has_key(server.hostname or ""):
        return "offline", "no WANDB_API_KEY, and no entry in netrc"
    # W&B itself would try for minutes, at the process's end as well
    return ("online", "") if _answers(server) else ("offline", f"{server.hostname} does not answer")


def _answers(server: urllib.parse.ParseResult) -> bool:
    """Whether a connection to the server, or to the proxy that leads to it, can be opened."""
    proxy = urllib.request.getproxies().get(server.scheme)
    if proxy and not urllib.request.proxy_bypass(server.hostname or ""):
        server = urllib.parse.urlparse(proxy)
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        socket.create_connection((server.hostname or "", port), timeout=_REACH).close()
    except OSError:
        return False
    return True


def has_key(host: str) -> bool:
    """Whether W&B can log in without asking: WANDB_API_KEY, or an entry for its host in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
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
        "init_timeout": _START,
        "finish_timeout": _END,
        "disable_git": True,
        "disable_code": True,
        "x_disable_meta": True,
    }
    return kind(**{k: v for k, v in wanted.items() if k in kind.model_fields})


def _identity(run: Path) -> str:
    """The run's id at W&B, kept in its folder: a run that goes on goes on there as well.

    `wandb agent` says which run of its sweep this is; a study within one has more runs than that, and ids of its own.
    """
    file = run / "wandb" / "id"
    if not file.exists():
        of_sweep = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
        in_study = (run.parent.parent / "study.yaml").exists()
        file.parent.mkdir(exist_ok=True)
        file.write_text((None if in_study else of_sweep) or uuid.uuid4().hex[:12], encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _where(run: Any, folder: Path, reason: str) -> str:
    if getattr(run, "offline", False):
        return f"wandb: offline ({reason}); `wandb sync {folder / 'wandb'}/offline-run-*` sends it later"
    return f"wandb: {run.url}" if run.url else "wandb: on"
