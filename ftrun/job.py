"""YAML -> one frozen, typed Job. Knows the groups and their rooms; knows no part by name.

Nothing here imports torch: a job is valid or refused before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ftrun import early, schema
from ftrun.errors import UserError, unknown
from ftrun.schema import option
from ftrun.secrets import hidden

# a group's options live in the variant that `kind` names, in this package; or, where a group has one kind, in a module
ROOMS = {
    "model": "ftrun.models.options",
    "method": "ftrun.methods",
    "quant": "ftrun.models.quant",
    "data": "ftrun.data.formats",
    "optim": "ftrun.optim",
    "eval": "ftrun.evals",
    "log": "ftrun.metrics.trackers",
    "device": "ftrun.memory.device",
}
GROUPS = (*ROOMS, "recipe")  # a recipe chooses among the others
# groups of a study (ftrun -m), not of its jobs
STUDY_ROOMS = {"search": "ftrun.studies.search", "launcher": "ftrun.studies.launchers"}
# keys of a study that stand for an option of its search
STUDY_KEYS = {"budget": "search.budget", "trials": "search.trials"}
# where and how a run is watched is not what it computes
_PLACES = (
    "name",
    "out",
    "resume",
    "refuse",
    "allow_drift",
    "debug",
    "log",
    "save_every",
    "save_last",
    "max_restarts",
)
_ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """A group's choice ("qlora"), the module of its kind ("ftrun.methods.lora") and its typed options."""

    choice: str
    kind: str
    module: str
    options: Any

    def load(self) -> ModuleType:
        """The variant's module, imported now (torch and all)."""
        return importlib.import_module(self.module)

    def typed(self) -> Any:
        """The options as an instance of the imported module's own class."""
        cls = self.load().Options
        return cls(**{f.name: getattr(self.options, f.name) for f in dataclasses.fields(cls) if f.init})


@dataclass(frozen=True)
class Job:
    """One composed, validated job. Groups are Parts; the rest are the keys at the root (see conf/config.yaml)."""

    model: Part
    method: Part
    quant: Part
    data: Part
    optim: Part
    eval: Part
    log: Part
    device: Part
    lr: float = option(2e-4, "learning rate at its highest", gt=0)
    steps: int | None = option(None, "optimiser steps; null: as many as epochs needs", ge=1)
    epochs: float | None = option(None, "passes over the data; null together with steps: 1", gt=0)
    batch: int = option(16, "rows an optimiser step, over all devices and accumulation", ge=1)
    micro_batch: int | str = option(
        "auto", "rows at once on a device, or auto", ge=1, pattern="auto", form="auto, or a number of rows at once as 8"
    )
    seq_len: int = option(512, "tokens a row at most; longer rows: data.overlong", ge=2)
    seed: int = option(0, "seed of every random choice", ge=0, le=2**32 - 1)
    checkpointing: int | str = option(
        "auto",
        "layers recomputed in backward, from the lowest trained one on: none, all, auto, or a number",
        ge=0,
        pattern="none|all|auto",
        form="none, all, auto, or a number of layers as 12",
    )
    keep_prefix: str = option(
        "auto",
        "keep what the layers below all that trains give a row, for later epochs: auto, none, memory or disk",
        choices=("auto", "none", "memory", "disk"),
    )
    loss_chunk: int = option(512, "tokens whose logits are held at once by the fast loss", ge=1)
    kernels: str = option("fast", "fast, or reference: the same maths, the plain way", choices=("fast", "reference"))
    devices: int = option(1, "devices that share the work", ge=1)
    strategy: str = option(
        "auto",
        "how several devices share: ddp, the base whole on each; fsdp, a part on each; auto: ddp where it fits",
        choices=("auto", "ddp", "fsdp"),
    )
    offload: bool = option(False, "with fsdp: each device's part of the base waits in host memory")
    max_restarts: int = option(0, "how often workers are started anew after one was lost", ge=0)
    nnodes: int | None = option(None, "machines that share the devices; null: this one, or a Slurm step's", ge=1)
    rdzv_endpoint: str | None = option(
        None, "where several machines meet, HOST:PORT of the first; null: found within Slurm", pattern=r"[^\s:]+:\d+"
    )
    save_every: int | str | None = option(
        "10min",
        "checkpoint each so many steps, or time as 10min; null: at the end and when stopped",
        ge=1,
        pattern=r"\d+(\.\d+)?(s|min|h)",
        form="steps as 50, time as 90s, 10min or 2h, or null: only at the end and when stopped",
    )
    save_last: int = option(2, "the newest checkpoints that are kept, beside the best one", ge=1)
    skip_nonfinite: int = option(
        3,
        "steps in all whose update is skipped because their loss or gradients are not finite; one more ends the run",
        ge=0,
    )
    name: str | None = option(
        None,
        "the run's name; by default method, rank and the time",
        pattern=r"(?!\.{1,2}$)[^/\0]+",
        form="a folder's name without /, for runs/NAME (another place: out=DIR)",
    )
    out: str | None = option(
        None, "the run's folder; by default runs/NAME", pattern=r"[^\0]+", form="the path of a folder, as out=runs/one"
    )
    resume: str = option(
        "auto", "auto: go on in the same folder; never; force: accept a changed job", choices=("auto", "never", "force")
    )
    refuse: bool = option(True, "refuse a job that does not fit the device")
    allow_drift: bool = option(False, "go on with an adapter that was trained on another base, and record it")
    debug: bool = option(False, "show tracebacks")
    tree: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def choices(self) -> dict[str, str]:
        """Each group's choice: {"method": "qlora", ...}."""
        return {group: getattr(self, group).choice for group in ROOMS}

    @property
    def key(self) -> str:
        """16 hex digits that jobs share where they compute the same: the hash of its options, less its places."""
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in (*_PLACES, "tree")}
        found = {k: [v.kind, _plain(v.options)] if isinstance(v, Part) else v for k, v in named.items()}
        return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """What job.yaml holds: the groups' choices, then the resolved tree, its secrets hidden."""
        return {"choices": self.choices, **hidden(self.tree)}

    def check(self) -> None:
        """Ask each part what is wrong on this machine, before anything heavy is imported. Raises UserError.

        A variant answers by a function `check(options)` of its file, or by a method `check()` of its options; what it
        makes of the other parts it says by a function `check_job(job)`.
        """
        early.check(self)
        for group in ROOMS:
            part = getattr(self, group)
            file = find_variant(group, part.kind)[1]
            for name, asked in (("check", part.options), ("check_job", self)):
                check = schema.read_check(file, name)
                if check is not None:
                    check(asked)
            if hasattr(part.options, "check"):
                part.options.check()

    def save_interval(self) -> tuple[int | None, float | None]:
        """(steps, seconds) between checkpoints; None for the one that does not apply."""
        if self.save_every is None or isinstance(self.save_every, int):
            return self.save_every, None
        number, unit = re.fullmatch(r"([\d.]+)(s|min|h)", self.save_every).groups()  # type: ignore[union-attr]
        return None, float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


def make_job(
    tree: Mapping[str, Any],
    choices: Mapping[str, str],
    names: Mapping[str, str] | None = None,
    borrowed: Collection[str] = (),
) -> Job:
    """The typed job of a composed and resolved tree.

    names: what the user calls a path, where it is not the path itself ("method.rank" -> "rank"). borrowed: keys at
    the root that only a group's options read. Raises UserError on whatever is wrong, naming the key as typed.
    """
    names = names or {}
    parts: dict[str, Any] = {group: make_part(group, tree.get(group) or {}, choices[group], names) for group in ROOMS}
    hints, fields = schema.field_types(Job), schema.fields_by_key(Job)
    known = fields.keys() - ROOMS.keys() - {"tree"}
    root = {k: v for k, v in tree.items() if k not in ROOMS and (k in known or k not in borrowed)}
    for key in root:
        if key not in known:
            raise UserError(unknown("the key", key, known | set(borrowed)))
    checked = {k: schema.check(hints[k], v, fields[k].metadata, names.get(k, k)) for k, v in root.items()}
    job = Job(**parts, **checked, tree=dict(tree))
    _check_across(job)
    return job


def make_part(group: str, values: Mapping[str, Any], choice: str, names: Mapping[str, str]) -> Part:
    """A group's choice from its options. Raises UserError on whatever is wrong, naming the key as typed."""
    if not isinstance(values, Mapping):
        raise UserError(f"{group}: expected the options of a {group}, found {values!r}")
    kind = values.get("kind", "")
    module, path = find_variant(group, str(kind))
    options = schema.build(schema.read_options(path), {k: v for k, v in values.items() if k != "kind"}, group, names)
    return Part(choice, str(kind), module, options)


def _plain(options: Any) -> dict[str, Any]:
    """Options as values, files by their whole paths: what they hold is not looked into."""
    values = dataclasses.asdict(options)
    return {k: str(Path(v).expanduser().resolve()) if _is_file(k, v) else v for k, v in values.items()}


def _is_file(key: str, value: Any) -> bool:
    named = key.rpartition("_")[2] == "path" or key == "from_"
    return named and isinstance(value, str) and Path(value).expanduser().exists()


def find_variant(group: str, kind: str) -> tuple[str, Path]:
    """The module and file of a group's variant: one of ours, or an installed entry point of the room's name.

    Raises UserError on an unknown kind.
    """
    room = {**ROOMS, **STUDY_ROOMS}[group]
    folder = _ROOT.joinpath(*room.split(".")[1:])
    if not folder.is_dir():
        return room, folder.with_suffix(".py")
    path = folder / f"{kind}.py"
    if re.fullmatch(r"[A-Za-z]\w*", kind) and path.is_file():
        return f"{room}.{kind}", path
    outside = {e.name: e.value for e in importlib.metadata.entry_points(group=room)}
    if kind not in outside:
        ours = {p.stem for p in folder.glob("[a-z]*.py") if "class Options" in p.read_text(encoding="utf-8")}
        raise UserError(unknown(f"{group}.kind:", kind, ours | set(outside)))
    try:
        spec = importlib.util.find_spec(outside[kind])
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(f"{group}.kind={kind}: the module {outside[kind]} of its entry point is not installed")
    return outside[kind], Path(spec.origin)


def _check_across(job: Job) -> None:
    if job.steps is not None and job.epochs is not None:
        raise UserError(f"steps={job.steps} and epochs={job.epochs:g}: give one of them, the other stays null")
    rows = job.micro_batch if isinstance(job.micro_batch, int) else 1
    if job.batch % (rows * job.devices):
        wanted = f"a multiple of micro_batch × devices = {rows} × {job.devices} = {rows * job.devices}"
        raise UserError(f"batch={job.batch}: expected {wanted}")
