"""A case's figures in words."""

from __future__ import annotations

from typing import Any

from scripts.bench.figures import times
from scripts.bench.patterns import ORDER


def ratios(found: dict[str, Any]) -> str:
    """The ratios of a case's runs in one line."""
    text = f"  tokens/s × {times(found['speed'])}, peak memory × {times(found['memory'])}"
    if "held_out" in found:
        text += f", held-out loss {found['held_out_difference']:+.2%}, seconds to {found['level']:.4f} nats"
        text += f" × {found['time']:.2f}"
    return text


def breakdown(side: str, step: dict[str, Any]) -> str:
    """Where a step's time goes, and the largest of the rest."""
    total = step["profiled_s"]
    lines = [f"  a step of {side}, profiled: {total:.2f} s ({min(step['seconds']):.2f} s without)"]
    lines += [f"    {kind:20} {step['kinds'][kind]:7.3f} s  {step['kinds'][kind] / total:6.1%}" for kind in ORDER]
    named = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in list(step["rest"].items())[:6])
    return "\n".join([*lines, f"    of the rest: {named}"])


def counts(found: dict[str, Any]) -> str:
    """The share of the floor that each of our sides reaches, and what the counts say of two of them."""
    lines, each = [], {}
    for key in ("ours", "other"):
        if (step := found.get(f"step_of_{key}")) is None:
            continue
        each[key] = sum(step["operations"].values()) / step["tokens"]
        speed = found["summary"]["tokens_per_s"][key == "other"]
        share = step["floor_s"] / step["tokens"] * speed
        lines.append(
            f"  the floor of {found[key][0]['side']}: {each[key] / 1e9:.3f} GFLOP a token at "
            f"{step['products_per_s'] / 1e12:.2f} TFLOP/s; reached: {share:.1%}"
        )
    if len(each) == 2:
        ratio, speed = each["other"] / each["ours"], found["summary"]["speed"]["median"]
        lines.append(f"  the counts' ratio of speeds: {ratio:.3f}; measured / counted: {speed / ratio:.3f}")
    return "\n".join(lines)
