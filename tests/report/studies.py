"""Studies to report on: rows as a ledger holds them, with figures from smooth laws, so that the best is known."""

from __future__ import annotations

import itertools
import math
from typing import Any

BASE = 3.3921
_SHARE = {"all": 0.0, "last:8": 0.11, "first:10": 0.26, "lora": 0.0, "dora": -0.012, "houlsby": 0.05}


def row(number: int, values: dict[str, str], **changes: Any) -> dict[str, Any]:
    """A run that ended well, with a loss that falls with the rank and depends on method and layers."""
    rank = float(values["rank"]) if values.get("rank", "").isdigit() else 8.0
    loss = round(2.29 + 0.55 / (rank + 1.5) + sum(_SHARE.get(value, 0.0) for value in values.values()), 5)
    depth = {"last:8": 8, "first:10": 10}.get(values.get("layers", "all"), 30)
    trained = int(depth * rank * 18_700)
    dora = values.get("method") == "dora"
    figures = {
        "loss": loss,
        "loss_before": BASE,
        "perplexity": math.exp(loss),
        "peak_bytes": int(2.1e8 + depth * 2.6e6 + 12 * trained + (6e7 if dora else 0)),
        "planned_peak_bytes": int(2.15e8 + depth * 2.6e6 + 12 * trained),
        "tokens_per_s": 910.0 - 11 * depth - rank - (170 if dora else 0),
        "seconds": 61.0 + 2.2 * depth,
        "steps": 120,
        "trainable_params": trained,
        "total_params": 134_515_008,
        "adapter_bytes": 4 * trained,
    }
    curve = [[s, loss + 1.1 * math.exp(-s / 18) + 0.05 * math.sin(0.9 * s + number)] for s in range(1, 121)]
    evals = [[s, loss + (BASE - loss) * math.exp(-s / 20)] for s in range(0, 121, 20)]
    return {
        "number": number,
        "values": values,
        "status": "finished",
        "reason": None,
        "same_as": None,
        "out": f"studies/ranks/runs/{number}",
        "figures": figures,
        "curve": curve,
        "evals": evals,
        **changes,
    }


def study(**swept: list[str]) -> list[dict[str, Any]]:
    """Every combination of the keys' values."""
    combinations = itertools.product(*swept.values())
    return [row(n, dict(zip(swept, values, strict=True))) for n, values in enumerate(combinations, start=1)]


def ended(number: int, values: dict[str, str], status: str, reason: str | None) -> dict[str, Any]:
    """A run that came to nothing."""
    return row(number, values, status=status, reason=reason, figures={}, curve=[], evals=[])


def rank_study() -> list[dict[str, Any]]:
    """Ranks alone, with what each adapter uses of its rank, what it forgets and how fast it answers."""
    rows = study(rank=["1", "2", "4", "8", "16", "32", "64"])
    for one in rows:
        rank = int(one["values"]["rank"])
        one["figures"] |= {
            "retention": 0.004 * rank**0.7,
            "effective_rank": rank**0.8,
            "base_ms": 21.3,
            "unmerged_ms": 24.8 + 0.02 * rank,
            "merged_ms": 21.4,
            "merges": True,
        }
    return rows


def grid_study() -> list[dict[str, Any]]:
    """Methods, layers and ranks: 18 runs, one of them too large for the device."""
    rows = study(method=["lora", "dora"], layers=["all", "last:8", "first:10"], rank=["4", "8", "16"])
    rows[11] = ended(12, rows[11]["values"], "does_not_fit", "needs 1.21 GB, and the device has 1.00 GB to plan for")
    return rows


def many() -> list[dict[str, Any]]:
    """A search of 200 runs over numbers and kinds, no two alike, a few of them without an end."""
    rows = []
    for n in range(1, 201):
        lr = f"{10 ** (-4.5 + 2 * ((n * 0.618) % 1)):.2e}"
        values = {"lr": lr, "rank": str(2 ** (n % 6)), "method": ("lora", "dora", "houlsby")[n % 3]}
        one = row(n, values)
        one["figures"]["loss"] += 0.3 * (math.log10(float(lr)) + 3.4) ** 2
        rows.append(one if n % 19 else ended(n, values, "diverged", "the loss was not finite at step 31"))
    return rows
