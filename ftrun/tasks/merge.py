"""Merge what a run has learnt into its base: a checkpoint that transformers and vLLM load by themselves.

Over a quantised base you choose what it is merged into. into=base: the base's own weights; the update was trained
beside quantised ones, so it corrects errors that are not there. into=dequantised: the weights that training saw,
written in full precision; the closest to what was evaluated. into=requantised: those, quantised again by the run's
scheme, as a bitsandbytes checkpoint; the smallest, and the rounding may lose much of the update. compare=true measures
all three.

What is measured, with U = merged − base: the share of the update that rounding to the file's precision loses,
1 − ⟨round(merged) − base, U⟩ / ‖U‖² (0: nothing; 1: all of it), in all and of the worst module; the noise of rounding,
‖round(merged) − merged‖² / ‖U‖², most of which lies beside the update; then the held-out loss and the
logits of the merged model beside those of the run as it was trained, both computing in the run's dtype. Measuring them
holds the tuned layers twice; measure=false writes with the model and one tensor more.

gguf=q8_0 hands the checkpoint to llama.cpp's convert_hf_to_gguf.py, found in llama_cpp=DIR, $LLAMA_CPP or on PATH.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.errors import UserError
from ftrun.job import Job
from ftrun.runs import aside, cache_dir, check_finished, check_place, finite, write_json
from ftrun.schema import option

INTO = {
    "base": "the base's own weights, as its files have them",
    "dequantised": "the quantised weights that training saw, written in full precision",
    "requantised": "those, quantised again as the run stored them (a bitsandbytes checkpoint)",
}
_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclass(frozen=True)
class Options:
    """What this verb takes besides the job's keys."""

    run: str | None = option(None, "the folder of a finished run")
    out: str | None = option(None, "the folder to write, which is not there yet, or empty")
    into: str | None = option(None, "base, dequantised or requantised; base where none is quantised", choices=(*INTO,))
    dtype: str | None = option(
        None, "precision of the file; null: model.dtype", choices=("bfloat16", "float16", "float32")
    )
    scale: float = option(1.0, "how much of the update: 1 as trained, 0 none of it")
    shard: str = option(
        "5GB", "bytes of a weights file at most", pattern=r"\d+(\.\d+)?(KB|MB|GB)", form="a size as 5GB"
    )
    measure: bool = option(True, "measure loss and logits on the held-out rows, beside what rounding loses")
    compare: bool = option(False, "measure every target that this base has, not only the one that is written")
    rows: int | None = option(100, "held-out rows at most; null: all of them", ge=1)
    gguf: str | None = option(None, "also a GGUF file of this type: f32, f16, bf16, q8_0, auto")
    llama_cpp: str | None = option(None, "llama.cpp's folder; null: $LLAMA_CPP, or what is on PATH")
    format: str = option("text", "text, or json: one object on standard output", choices=("text", "json"))


def run(job: Job, **options: Any) -> int:
    """Merge, write and measure; returns 0."""
    asked = Options(**options)
    report = Merging(job, asked, lambda text: print(text, file=sys.stderr)).report()
    if asked.format == "json":
        print(json.dumps(finite(report)))
    else:
        print("\n".join(told(report)))
    return 0


class Merging:
    """A run, merged. Raises UserError before anything is read where it cannot be."""

    def __init__(self, job: Job, asked: Options, say: Any) -> None:
        self.job, self.asked, self.say = job, asked, say
        self.run, self.out, self.drifts = Path(str(asked.run)), _free(asked.out), list[str]()
        check_finished(self.run)
        self.into = _into(job, asked)
        self.dtype = asked.dtype or job.model.options.dtype
        if not job.method.load().Tuner.merges:
            raise UserError(f"method={job.method.choice}: cannot be merged: {job.method.load().Tuner.why_not}")
        self.converter = self._converter()
        self.targets: dict[str, dict[str, Any]] = {}

    def _converter(self) -> Path | None:
        if self.asked.gguf is None:
            return None
        from ftrun.tasks.gguf import find

        if self.into == "requantised":
            raise UserError("gguf: llama.cpp reads plain weights: use into=base or into=dequantised")
        return find(self.asked.gguf, self.asked.llama_cpp)

    def report(self) -> dict[str, Any]:
        """What was written and measured, as JSON-able values."""
        import torch

        from ftrun.tasks.tuned import open_tuned

        job = self.job
        quantised = job.quant.kind != "none"
        if not job.method.load().Tuner.switchable:  # its masters as they are, not rounded to the compute dtype
            from ftrun.compose import changed

            job = changed(job, ["model.dtype=float32"])
        wanted = [*INTO] if self.asked.compare and quantised else [self.into]
        tuned = open_tuned(self.run, job, cache_dir(), self.say)
        self._check_base(tuned, wanted)
        self.drifts = tuned.drifts
        tuned.tuner.scale(tuned.model, self.asked.scale)
        if self.asked.measure:
            self.say("what merging costs, on held-out rows: first the model unmerged (measure=false leaves it out)")
        self.apart = self._measured(tuned)
        for into in [one for one in wanted if one != "base" or not quantised]:
            self._target(tuned, into, getattr(torch, self.dtype))
        if "base" in wanted and quantised:
            del tuned  # one model at a time
            tuned = open_tuned(self.run, job, cache_dir(), self.say, plain=True)
            tuned.tuner.scale(tuned.model, self.asked.scale)
            self._target(tuned, "base", getattr(torch, self.dtype))
        return self._finish()

    def _check_base(self, tuned: Any, wanted: list[str]) -> None:
        """A base that is quantised in its own files has no other weights."""
        if tuned.parts.base.prequantised and "base" in wanted:
            if self.into == "base":
                raise UserError("into=base: the base's own files hold quantised weights; use into=dequantised")
            wanted.remove("base")

    def _target(self, tuned: Any, into: str, dtype: Any) -> None:
        """One target measured, and written where it is the one that is asked for."""
        from ftrun.methods.merging import Loss
        from ftrun.tasks.merging import Output, drift

        try:
            output = Output(tuned, into, dtype)
        except UserError as error:
            if into == self.into:
                raise
            self.say(f"not compared: {error}")
            return
        self.say(f"into={into}: what rounding to {self.dtype} loses")
        lost = output.losses()
        total = sum(lost.values(), Loss())
        worst = max(lost, key=lambda name: lost[name].share, default=None)
        found: dict[str, Any] = {
            "lost": total.share if lost else None,
            "noise": total.noise if lost else None,
            "worst": worst and {"module": worst, "lost": lost[worst].share},
            "modules": {name: one.share for name, one in lost.items()},
        }
        if self.apart is not None:
            self.say(f"into={into}: the held-out rows through the merged model")
            with output.in_place():
                found |= drift(self.apart, self._measured(tuned))
        self.targets[into] = found
        if into == self.into:
            self._write(output)

    def _measured(self, tuned: Any) -> Any:
        from ftrun.tasks.merging import measure

        if not self.asked.measure:
            return None
        return measure(tuned, self.asked.rows)

    def _write(self, output: Any) -> None:
        self.say(f"writing {self.out}")
        try:
            with aside(self.out) as beside:
                beside.mkdir()
                files = output.write(beside, _bytes(self.asked.shard))
                self.files = {path.name: path.stat().st_size for path in files}
        except OSError as error:
            raise UserError(f"out={self.out}: cannot be written: {error.strerror or error}") from error

    def _finish(self) -> dict[str, Any]:
        report = {
            "run": str(self.run),
            "out": str(self.out),
            "method": self.job.method.choice,
            "into": self.into,
            "dtype": self.dtype,
            "scale": self.asked.scale,
            "drifts": self.drifts,
            "files": self.files,
            "unmerged_loss": self.apart and self.apart.loss,
            "targets": self.targets,
        }
        # the folder may be handed on: no place of this machine is in it
        write_json(self.out / "merge.json", {k: v for k, v in report.items() if k not in ("run", "out")})
        if self.converter is not None:
            from ftrun.tasks.gguf import convert

            report["gguf"] = str(convert(self.converter, self.out, str(self.asked.gguf)))
        return report


def told(report: Mapping[str, Any]) -> list[str]:
    """The report in lines."""
    size = sum(report["files"].values()) / 1e6
    lines = [f"{report['out']}: {len(report['files'])} weights files, {size:.1f} MB, {report['dtype']}"]
    if report["unmerged_loss"] is not None:
        what = "as trained" if report["scale"] == 1 else f"at scale {report['scale']:g}"
        lines.append(f"  {what:<12} held-out loss {report['unmerged_loss']:.4f}")
    for into, found in report["targets"].items():
        written = " (written)" if into == report["into"] else ""
        parts = []
        if found["lost"] is not None:
            parts.append(f"rounding loses {_share(found['lost'])} of the update")
            parts.append(f"at most {_share(found['worst']['lost'])}, in {found['worst']['module']}")
            parts.append(f"its noise, most of it beside the update, is {_share(found['noise'])} of the update's square")
        if found.get("loss") is not None:
            parts.append(f"held-out loss {found['loss']:.4f} ({found['loss_rise']:+.4f})")
            parts.append(f"logits differ by {_share(found['logits'])} of the largest, KL {found['kl']:.2g} nats")
        lines.append(f"  {into:<12} {'; '.join(parts) or 'nothing to round'}{written}")
    return [*lines, f"  {report['gguf']}"] if "gguf" in report else lines


def _share(value: float) -> str:
    if 0 < abs(value) < 1e-6:  # float32's own rounding
        return "under 0.0001 %"
    return f"{100 * value:.2g} %" if abs(value) < 0.1 else f"{100 * value:.0f} %"


def _into(job: Job, asked: Options) -> str:
    """The target. Over a quantised base there is no default: each is another model."""
    if job.quant.kind == "none":
        if asked.into not in (None, "base"):
            raise UserError(f"into={asked.into}: this run's base is not quantised: only into=base")
        return "base"
    if asked.into is None:
        listed = "".join(f"\n  into={name}: {text}" for name, text in INTO.items())
        raise UserError(
            f"into is missing: the run's base is quantised (quant={job.quant.choice}): say what the update is merged "
            f"into.{listed}\ncompare=true measures all three"
        )
    return asked.into


def _free(out: str | None) -> Path:
    if out is None:
        raise UserError("out is missing: ftrun merge run=DIR out=DIR, the folder to write")
    path = Path(out)
    if os.path.exists(path) and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"out={out}: something is there already; name another folder")
    check_place(path)
    return path


def _bytes(size: str) -> float:
    return float(size[:-2]) * _UNITS[size[-2:]]
