"""A study's rows, as its table and its page have them: each point once, with what its run came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftrun.metrics.jsonl import read
from ftrun.runs import read_json

_FROM_RESULT = ("steps", "seconds", "tokens_per_s", "trainable_params", "total_params", "adapter_bytes")


def figures_of(run: Path, until: int | None = None) -> dict[str, Any]:
    """What a run's folder says that it came to: the keys of a row's figures that are there.

    until: the step at which it was left (None: it was to go to its end). `rung_loss` is the held-out loss at that step,
    or, of a run that was stopped on the way, the last one that was measured.
    """
    result = read_json(run / "result.json") or {}  # {}: killed before it was written
    found = {key: result.get(key) for key in _FROM_RESULT}
    evals, memory = result.get("eval") or {}, result.get("memory") or {}
    before, after = evals.get("before") or {}, evals.get("after") or {}
    found |= {"loss": after.get("loss"), "perplexity": after.get("perplexity"), "loss_before": before.get("loss")}
    found |= {"train_loss": result.get("loss_last")}
    found |= {"peak_bytes": memory.get("measured_peak_bytes") or memory.get("planned_peak_bytes")}
    found |= {"planned_peak_bytes": memory.get("planned_peak_bytes"), "process_bytes": memory.get("process_peak_bytes")}
    latency = result.get("latency") or {}
    found |= {key: latency.get(key) for key in ("base_ms", "unmerged_ms", "merged_ms", "merges")}
    found |= {"retention": (result.get("retention") or {}).get("rise")}
    found |= {"effective_rank": (result.get("effective_rank") or {}).get("mean")}
    if until is not None or result.get("status") != "finished":
        on_the_way = {r["step"]: r.get("loss") for r in read(run / "evals.jsonl") if r["step"]}
        found |= {"rung_loss": on_the_way.get(max(on_the_way, default=0) if until is None else until)}
    return {key: value for key, value in found.items() if value is not None}


def curves_of(run: Path) -> dict[str, list[list[float]]]:
    """The training loss and the held-out loss over steps."""
    steps, evals = read(run / "metrics.jsonl"), read(run / "evals.jsonl")
    return {
        "curve": [[row["step"], row["loss"]] for row in steps if row.get("loss") is not None],
        "evals": [[row["step"], row["loss"]] for row in evals if row.get("loss") is not None],
    }


def row(number: int, values: Mapping[str, str], status: str, reason: str | None, out: str | None) -> dict[str, Any]:
    """A row without figures."""
    found = {"number": number, "values": dict(values), "status": status, "reason": reason, "out": out}
    return {**found, "same_as": None, "figures": {}, "curve": [], "evals": []}


def rows_of(events: Sequence[Mapping[str, Any]], folder: Path, curves: bool = True) -> list[dict[str, Any]]:
    """The points of a study's ledger in the order in which they were first asked for; equal jobs point to the first."""
    ended = (e for e in events if e["event"] == "end" and e.get("kind") != "probe")
    ends: dict[str, Mapping[str, Any]] = {e["key"]: e for e in ended}
    begun = {e["key"] for e in events if e["event"] == "begin"}
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    first: dict[str, int] = {}
    for event in events:
        if event["event"] != "trial" or event.get("kind") == "probe":
            continue
        name = tuple(sorted(event["values"].items()))
        if name in found:
            continue
        key, number = event["key"], len(found) + 1
        run = folder / "runs" / event["folder"] if event.get("folder") else None
        end = ends.get(key) or {"status": "running" if key in begun else "waiting"}
        made = row(number, event["values"], *_ended(end), str(run) if run else None)
        made["note"] = event.get("note") or ""
        made["figures"] = dict(end.get("figures") or {})
        if key in first:
            made |= {"same_as": first[key], "status": "same"}
        elif run is not None and curves:
            made |= curves_of(run)
        first.setdefault(key, number)
        found[name] = made
    return list(found.values())


def _ended(end: Mapping[str, Any]) -> tuple[str, str | None]:
    if end["status"] == "paused":
        return "pruned", f"left after {end.get('until')} steps"
    return str(end["status"]), end.get("reason")
