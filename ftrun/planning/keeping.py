"""Whether the outputs of the layers below all that trains are kept from one epoch to the next, and where."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftrun.errors import UserError
from ftrun.job import Job
from ftrun.memory import host
from ftrun.memory.device import SHARE, Device
from ftrun.planning.plan import Kept
from ftrun.planning.settle import Settled, Supply, Worst, settle
from ftrun.planning.twin import Twin
from ftrun.runs import read_json

FOLDER = "prefix"  # within the run's own
_AMPLE = 2  # times the bytes that are written must be free, so that `auto` takes a disk


def settle_keeping(
    job: Job,
    twin: Twin,
    supply: Callable[[Job], Worst],
    device: Device,
    source: str = "data",
    out: Path | None = None,
    earlier: dict[str, Any] | None = None,
) -> Settled:
    """The job settled, and what it keeps of its frozen layers decided (`plan.kept_prefix` says why).

    `auto` gives up no rows at once and no kept layer for it: memory is taken where the job as it is leaves room.
    out: the run's folder. earlier: what a run that is gone on with had decided; whether it keeps, stays.
    Raises UserError where keep_prefix names a place, and nothing can be kept.
    """
    asked, worst = job.keep_prefix, supply(job)
    tokens, why_not = _tokens(job, twin, supply)
    if why_not or asked == "none":
        if asked in ("memory", "disk") and not twin.below:
            raise UserError(f"keep_prefix={asked}: {why_not}; expected auto or none")
        return settle(job, twin, worst, device, source, Kept(why=why_not or "keep_prefix=none"))
    rows = len(supply.lengths) if isinstance(supply, Supply) else 0
    choose = _Choice(device, out or Path("runs"), earlier or {})
    try:
        if asked == "memory":
            return settle(job, twin, worst, device, source, Kept("memory", rows, tokens, "as asked"))
        kept = settle(job, twin, worst, device, source, Kept("disk", rows, tokens, "as asked"))
    except UserError as error:
        if asked != "auto":
            raise
        return settle(job, twin, worst, device, source, Kept(why=str(error)))
    size = tokens * twin.output_bytes
    if asked == "auto" and not kept.plan.fits:
        return settle(job, twin, worst, device, source, Kept("none", rows, tokens, "the job does not fit"))
    if asked == "disk":
        if (free := choose.free_on_disk()) < size:
            raise UserError(f"keep_prefix=disk: {_gb(size)} are to be kept, and {choose.out} has {_gb(free)} free")
        return kept
    where, why = choose(size, kept.plan.needed_bytes)
    if where == "disk":
        return dataclasses.replace(kept, plan=_because(kept, why), kept=dataclasses.replace(kept.kept, why=why))
    if where == "none":
        return settle(job, twin, worst, device, source, Kept("none", rows, tokens, why))
    fixed = dataclasses.replace(job, micro_batch=kept.micro_batch, checkpointing=kept.recomputed)
    return settle(fixed, twin, worst, device, source, Kept("memory", rows, tokens, why))


def _because(settled: Settled, why: str) -> Any:
    return dataclasses.replace(settled.plan, kept_prefix={**settled.plan.kept_prefix, "why": why})


def _tokens(job: Job, twin: Twin, supply: Callable[[Job], Worst]) -> tuple[int, str]:
    """(tokens of the rows that are seen again, why nothing can be kept)."""
    if job.devices > 1:
        return 0, "several devices share the rows"
    if not twin.below:
        return 0, f"method={job.method.choice} trains the lowest layer or what lies below it: no layer stays as it is"
    if not isinstance(supply, Supply):
        return 0, "no data at hand: it is decided once the rows are known"
    if supply.epochs(job) <= 1:
        return 0, "no row is seen more than once"
    return int(supply.lengths.clip(max=job.seq_len).sum()), ""


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Where `auto` keeps so many bytes beside a job that needs what it needs."""

    device: Device
    out: Path
    earlier: dict[str, Any]

    def __call__(self, size: int, needed: int) -> tuple[str, str]:
        """(memory, disk or none; why)."""
        before, tokens = self.earlier.get("where"), self.earlier.get("tokens")
        if before == "none" and tokens:
            return "none", "the run began without"
        if self.device.type != "cpu" and not self.device.present:
            return "memory", f"{_gb(size)}, where that machine's host memory holds them"
        room = self._room() - (needed if self.device.type == "cpu" else 0)
        if size <= room:
            return "memory", f"{_gb(size)} of the {_gb(room)} that the job leaves free"
        free = self.free_on_disk()
        if (size if before in ("memory", "disk") else _AMPLE * size) <= free:
            return "disk", f"{_gb(size)}; memory has room for {_gb(max(0, room))}, {self.out} {_gb(free)} free"
        return "none", f"{_gb(size)} are too many for {_gb(max(0, room))} of memory, or {_gb(free)} free for {self.out}"

    def _room(self) -> int:
        """Bytes of host memory that can be planned for."""
        return self.device.usable_bytes if self.device.type == "cpu" else int(SHARE["cpu"] * host.memory()[1])

    def free_on_disk(self) -> int:
        """Bytes free for the run's folder, what it keeps already counted in."""
        there = next(p for p in (self.out, *self.out.absolute().parents) if p.exists())
        kept = self.out / FOLDER / "rows.bin"
        return shutil.disk_usage(there).free + (kept.stat().st_blocks * 512 if kept.is_file() else 0)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def kept_before(out: Path) -> dict[str, Any]:
    """What the run that lies in `out` had decided; {} where none does, or its plan is damaged."""
    try:
        return dict((read_json(out / "plan.json") or {}).get("kept_prefix") or {})
    except (UserError, TypeError, ValueError, AttributeError):
        return {}


def keeping_notes(job: Job, settled: Settled, below: int) -> list[str]:
    """What was decided, in a line; none where there was nothing to decide."""
    made = settled.plan.kept_prefix
    if made["where"] != "none":
        where = "in memory" if made["where"] == "memory" else "on disk"
        return [
            f"keep_prefix: what the first {below} layers give {made['rows']:,} rows is kept {where}, from the first "
            f"epoch to the last: {made['bytes'] / 1e9:.2f} GB ({made['why']})"
        ]
    if job.keep_prefix in ("memory", "disk"):
        return [f"warning: keep_prefix={job.keep_prefix}: nothing is kept: {made['why']}"]
    return [f"keep_prefix: nothing is kept: {made['why']}"] if made["tokens"] else []
