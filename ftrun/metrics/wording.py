"""Records in words: the lines that the terminal and log.txt share. Pure text, no terminal codes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ftrun.values import EvalRecord, StepRecord

_BARS = "▁▂▃▄▅▆▇█"
_LONGEST = 60  # characters of one value in the job's table


def job_rows(job: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The composed job as rows: a group, its choice and options; then what stands at the root.

    job: {"choices": {group: name}, group: {option: value}, key: value}. Nulls, nested tables, and root keys that
    a group shows already are left out.
    """
    choices = job.get("choices", {})
    groups = {k: v for k, v in job.items() if isinstance(v, Mapping) and k != "choices"}
    shown = {k: v for options in groups.values() for k, v in options.items()}
    root = {k: v for k, v in job.items() if k not in groups and k != "choices" and not (k in shown and shown[k] == v)}
    rows = []
    for group in choices or groups:
        options = dict(groups.get(group, {}))
        kind = options.pop("kind", "")
        choice = str(choices.get(group, kind))
        if group == "model":
            choice, options = _base(choice, options)
        rows.append((group, "  ".join(filter(None, [choice, _pairs(options)]))))
    return [*rows, ("run", _pairs(root))]


def _base(choice: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A base that the user named by its path is called by it; else only the place that it comes from is shown."""
    path, source = options.get("path"), options.get("source")
    places = {"hub", "package", "revision"}
    unused = (
        places | {"path", "source", "license"} if path else places - {source, "revision" if source == "hub" else ""}
    )
    if path and not str(path).startswith((".", "/", "~")):
        unused.discard("revision")
    return str(path or choice), {k: v for k, v in options.items() if k not in unused}


def _pairs(values: Mapping[str, Any]) -> str:
    plain = {k: v for k, v in values.items() if v is not None and v != "" and not isinstance(v, Mapping)}
    return "  ".join(f"{k}={_short(v)}" for k, v in plain.items())


def _short(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    text = text.replace("\n", " ")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def step(record: StepRecord, total: int | None, eta: float | None) -> str:
    """A step as a plain line."""
    of, width = (f"/{total}", len(str(total))) if total else ("", 0)
    parts = [
        f"step {record.step:>{width}}{of}",
        f"loss {record.loss:.4f}",
        f"{record.tokens_per_s:,.0f} tokens/s",
        f"mem {size(record.mem_allocated)} (peak {size(record.mem_peak)})",
        f"lr {record.lr:.2e}",
        f"grad {record.grad_norm:.3g}",
    ]
    return "  ".join(parts if eta is None else [*parts, f"eta {clock(eta)}"])


def live_parts(record: StepRecord, total: int | None, eta: float | None) -> list[str]:
    """What the live line says, the most important first: a narrow terminal shows the first few."""
    return [
        f"{record.step}/{total}" if total else f"step {record.step}",
        f"loss {record.loss:.3f}",
        f"{record.tokens_per_s:,.0f} tok/s",
        size(record.mem_allocated),
        *([] if eta is None else [f"eta {clock(eta)}"]),
        f"peak {size(record.mem_peak)}",
        f"lr {record.lr:.1e}",
    ]


def fitting(parts: Sequence[str], width: int) -> str:
    """As many of the parts, from the first, as `width` characters hold."""
    text = parts[0]
    for part in parts[1:]:
        if len(text) + 2 + len(part) > width:
            break
        text = f"{text}  {part}"
    return text


def evaluation(record: EvalRecord) -> str:
    best = "  (best so far)" if record.best else ""
    return (
        f"held-out at step {record.step}: loss {record.loss:.4f}  perplexity {record.perplexity:,.2f}  "
        f"({record.tokens:,} tokens, {clock(record.seconds)}){best}"
    )


def curve(losses: Sequence[float], width: int) -> str:
    """The losses in one line: "loss 3.21 ▇▅▃▂▁ 2.01", each bar the mean of its share of the steps."""
    finite = [x for x in losses if x == x and abs(x) != float("inf")]
    if len(finite) < 2:
        return ""
    ends = f"loss {finite[0]:.3f} ", f" {finite[-1]:.3f}"
    bars = max(2, min(len(finite), width - sum(map(len, ends)), 60))
    edges = [round(i * len(finite) / bars) for i in range(bars + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return ends[0] + "".join(_BARS[round((m - low) * scale)] for m in means) + ends[1]


def closing(result: Mapping[str, Any]) -> list[str]:
    """The lines that end a run: what was done, what it did to the held-out rows, and what memory it took."""
    lines = [
        f"{result.get('status', 'ended')}: {result.get('steps', 0):,} steps, {result.get('tokens', 0):,} tokens in "
        f"{clock(result.get('seconds') or 0.0)}, {result.get('tokens_per_s') or 0.0:,.0f} tokens/s"
    ]
    evals = result.get("eval") or {}
    before, after = evals.get("before") or {}, evals.get("after") or {}
    pairs = [
        f"{key} {before[key]:,.3f} → {after[key]:,.3f}"
        for key in ("loss", "perplexity")
        if before.get(key) is not None and after.get(key) is not None
    ]
    lines += [f"held-out {', '.join(pairs)}"] if pairs else []
    lines += _kept_and_lost(result)
    saves = result.get("checkpoints") or {}
    if saves.get("saved"):
        share = saves["waited_seconds"] / max(result.get("seconds") or 0.0, 1e-9)
        lines.append(f"checkpoints: {saves['saved']}, training waited {clock(saves['waited_seconds'])} ({share:.1%})")
    memory = result.get("memory") or {}
    planned, measured = memory.get("planned_peak_bytes"), memory.get("measured_peak_bytes")
    if planned and measured:
        lines.append(f"peak memory {size(measured)}, planned {size(planned)} ({(planned - measured) / measured:+.1%})")
    return lines


def _kept_and_lost(result: Mapping[str, Any]) -> list[str]:
    """What became of the base's own text, and how long a generated token takes, where they were measured."""
    lines, retention, latency = [], result.get("retention") or {}, result.get("latency") or {}
    if retention.get("rise") is not None:
        change = f"{retention['before']:.2f} → {retention['after']:.2f} ({retention['rise']:+z.2f})"
        lines.append(f"retention: the base's own text {change}")
    names = {"base_ms": "base", "unmerged_ms": "tuned", "merged_ms": "merged"}
    times = [f"{name} {latency[key]:.1f} ms" for key, name in names.items() if latency.get(key) is not None]
    return [*lines, f"a generated token: {', '.join(times)}"] if times else lines


def sample(row: Mapping[str, Any]) -> list[str]:
    """One prompt and its answers before and after, a line each."""
    names = [k for k in ("prompt", "before", "after") if row.get(k) is not None]
    return [f"{name:<7} {' '.join(str(row[name]).split())}" for name in names]


def size(count: float) -> str:
    """Bytes in words: 1 GB = 1e9 bytes."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def clock(seconds: float) -> str:
    """Seconds in words: 4.2 s, 3:05, 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
