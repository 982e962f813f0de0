"""Does what a run has learnt belong to the base at hand? Reads its bytes afresh; loads no weight.

Compared with the run's provenance.json: the base's weights tensor by tensor, its revision on the hub, how it is
quantised, its tokenizer and its chat template. Of the adapter: whether its file is whole and the one that was written,
whether every tensor found its module, and whether the update does anything at all.

Exit code 0 where it is sound, 2 where it is not.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftrun.errors import UserError
from ftrun.job import Job
from ftrun.runs import cache_dir, read_json
from ftrun.schema import option


@dataclass(frozen=True)
class Options:
    """What this verb takes besides the job's keys."""

    run: str | None = option(None, "the folder of a finished run")
    format: str = option("text", "text, or json: one object on standard output", choices=("text", "json"))


@dataclass(frozen=True)
class Finding:
    """One thing looked at. state: same, note (worth saying, no fault), allowed (a drift, with allow_drift) or wrong."""

    what: str
    state: str
    detail: str


def run(job: Job, run: str, format: str) -> int:
    """Print what was found; returns 0. Raises UserError, with all that is wrong, where anything is."""
    folder = learnt(Path(run))
    found = Checking(job, folder, lambda text: print(text, file=sys.stderr)).findings()
    wrong = [one for one in found if one.state == "wrong"]
    if format == "json":
        print(json.dumps({"folder": str(folder), "sound": not wrong, "findings": [asdict(one) for one in found]}))
    else:
        for one in found:
            print(f"  {one.what:<13} {one.state:<8} {one.detail}")
    if wrong:
        listed = "".join(f"\n  {one.what}: {one.detail}" for one in wrong)
        raise UserError(f"{folder}: not sound:{listed}")
    if format == "text":
        print(f"{folder}: sound")
    return 0


def learnt(run: Path) -> Path:
    """The folder of a run that holds what it learnt: adapter/, or model/ of method=full. UserError without either."""
    for name in ("adapter", "model"):
        if (run / name).is_dir():
            return run / name
    raise UserError(
        f"run={run}: holds neither adapter/ nor model/: it is not at its end; the same command goes on with it: "
        f"ftrun job={run}/job.yaml out={run}"
    )


class Checking:
    """A folder of what was learnt beside the base of its job; every finding, not only the first."""

    def __init__(self, job: Job, folder: Path, say: Callable[[str], None]) -> None:
        from ftrun import assemble

        self.job, self.folder, self.say, self.cache = job, folder, say, cache_dir()
        self.parts = assemble.sketch(job, self.cache, say, whole=True)
        try:
            self.recorded = read_json(folder / "provenance.json")
        except UserError as error:
            self.recorded = {"unreadable": str(error)}

    def findings(self) -> list[Finding]:
        """The base's facts, the files', then the adapter's or the model's."""
        found = [*self._base(), *self._files()]
        found += self._adapter() if self.folder.name == "adapter" else self._model()
        return [*found, *self._versions()]

    def _base(self) -> list[Finding]:
        from ftrun.models import provenance

        if self.recorded is None or "unreadable" in self.recorded:
            why = "missing, so that nothing can be compared" if self.recorded is None else self.recorded["unreadable"]
            return [Finding("provenance", "wrong", f"{provenance.FILE}: {why}")]
        now = provenance.record(self.parts.base, self.parts.quantiser.scheme(), fresh=True)
        try:
            drifts = {one.what: one for one in provenance.drifts(self.recorded, now)}
        except UserError as error:
            return [Finding("provenance", "wrong", str(error))]
        here = {"weights": _weights(now), "quantisation": now["quantisation"], "revision": now["base"]["revision"]}
        state = "allowed" if self.job.allow_drift else "wrong"
        found = []
        for what in ("weights", "revision", "quantisation", "tokenizer", "template"):
            if what in drifts:
                one = drifts[what]
                found.append(Finding(what, state, f"{one.recorded} in training, {one.found} now. {one.remedy}"))
            elif what in ("tokenizer", "template") and what not in self.recorded:
                found.append(Finding(what, "note", "not on record"))
            elif what != "revision" or here["revision"]:
                found.append(Finding(what, "same", str(here.get(what) or now[what] or "none")[:80]))
        return found

    def _files(self) -> list[Finding]:
        """Whether the learnt files are those that training wrote."""
        from ftrun.models.digests import digest

        wrong = []
        files = (self.recorded or {}).get("files") or {}
        if not isinstance(files, dict):
            return [
                Finding("files", "wrong", f"provenance.json: files: expected names and hashes, found {files!r:.80}")
            ]
        for name, recorded in files.items():
            path = self.folder / name
            if not path.is_file():
                wrong.append(f"{name} is missing")
                continue
            try:
                whole = digest(path, self.cache, self.say, fresh=True).whole
            except UserError as error:
                wrong.append(str(error))
                continue
            if whole != recorded:
                wrong.append(
                    f"{name}: sha256 {str(recorded)[:16]} as training wrote it, {whole[:16]} now: it was changed"
                )
        if wrong:
            return [Finding("files", "wrong", "; ".join(wrong))]
        return [Finding("files", "same", ", ".join(files))] if files else [Finding("files", "note", "not on record")]

    def _adapter(self) -> list[Finding]:
        from ftrun import assemble
        from ftrun.methods.files import load_adapter
        from ftrun.models.load import prepare

        try:
            config, tensors = load_adapter(self.folder)
        except UserError as error:
            return [Finding("adapter", "wrong", str(error))]
        prepare(self.parts.model, self.parts.quantiser, self.parts.base)
        assemble.attach(self.job, self.parts)
        tuner = self.parts.tuner
        try:
            tuner.check(config)
            tuner.fitting(self.parts.model, tensors)
        except UserError as error:
            placed = Finding("modules", "wrong", str(error))
        else:
            placed = Finding("modules", "same", f"{len(tensors)} tensors, each has its module")
        return [placed, *self._effect(tensors)]

    def _effect(self, tensors: dict[str, Any]) -> list[Finding]:
        """Whether the values are numbers and the last factors are not all zero."""
        broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        if broken:
            return [Finding("update", "wrong", f"{len(broken)} tensors hold values that are no number: {broken[0]}")]
        tuner = self.parts.tuner
        last = [name for name in tensors if name.endswith(tuner.last_factors)]
        idle = tuner.idle(tensors)
        if last and len(idle) == len(last):
            told = f"the adapter does nothing: its last factor is zero in all {len(last)} updates"
            return [Finding("update", "wrong", told)]
        if idle:
            told = f"{len(idle)} of {len(last)} updates do nothing, their last factor is zero: {idle[0]}"
            return [Finding("update", "note", told)]
        return [Finding("update", "same", f"none of {len(last) or len(tensors)} is zero")]

    def _model(self) -> list[Finding]:
        """Of method=full: a whole model of the base's shapes, and not the base again."""
        from ftrun.models.sources import folder as folders

        try:
            files = folders.weight_files(self.folder)
        except UserError as error:
            return [Finding("model", "wrong", str(error))]
        placed = self._placed({name: facts for path in files for name, facts in folders.read_header(path).items()})
        own = {name: one for path in files for name, one in self._digest(path).items()}
        if own and own == (self.recorded or {}).get("tensors"):
            return [placed, Finding("update", "wrong", "the model is the base: no weight has changed")]
        return [placed]

    def _placed(self, header: dict[str, Any]) -> Finding:
        from ftrun.models.mapping import may_be_missing, plan

        model = self.parts.model
        expected, tied = model.state_dict(), model.all_tied_weights_keys
        entries, homeless = plan(model, header)
        if homeless:
            return Finding("modules", "wrong", f"the model has no place for {homeless[0]}")
        for entry in entries:
            shape = header[entry.sources[0][0]]["shape"]
            if entry.converter is None and list(expected[entry.target].shape) != shape:
                told = f"{entry.target} has the shape {shape}, expected {list(expected[entry.target].shape)}"
                return Finding("modules", "wrong", told)
        lost = expected.keys() - {e.target for e in entries if e.converter is None} - set(tied)
        lost = {n for n in lost if not may_be_missing(model, n)} if not any(e.converter for e in entries) else set()
        if lost:
            return Finding("modules", "wrong", f"the files lack {min(lost)}")
        return Finding("modules", "same", f"{len(header)} tensors, each has its module")

    def _digest(self, path: Path) -> dict[str, str]:
        from ftrun.models.digests import digest

        return digest(path, self.cache, self.say).tensors

    def _versions(self) -> list[Finding]:
        """Other versions are no fault: they are worth knowing where results differ."""
        recorded = (self.recorded or {}).get("versions") or {}
        if not isinstance(recorded, dict):
            return [Finding("versions", "wrong", f"provenance.json: expected packages, found {recorded!r:.80}")]
        now = {name: _version(name) for name in recorded}
        changed = [f"{name} {old}, now {now[name]}" for name, old in recorded.items() if now[name] != old]
        return [Finding("versions", "note" if changed else "same", "; ".join(changed) or f"{len(now)} packages")]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):  # ValueError: of an empty name
        return "not installed"


def _weights(now: dict[str, Any]) -> str:
    return f"sha256 {str(now['base']['hash'])[:16]}, {len(now['tensors'])} tensors"
