"""The held-out loss of adapters in PEFT's format, whoever trained them: one plain program for all.

    python -m scripts.bench.held_out JSON    {model, quant, rows, adapters: [folder, ...]}

transformers and PEFT alone, padded rows, full logits, float32: what an adapter has learnt. (In bfloat16 PEFT adds a
LoRA update to outputs that are rounded already, and most of a young update is lost in that, whoever trained it; its
DoRA loses less. Two programs' adapters would be told apart by that.) Prints one JSON: {"base": loss,
"adapters": [loss, ...], "tokens": n}, the losses in nats a supervised token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from scripts.bench import peer

_BATCH = 8


@torch.no_grad()
def loss(model: Any, rows: Sequence[dict[str, list[int]]]) -> tuple[float, int]:
    """(mean loss over the supervised tokens of the rows, how many they are)."""
    total, count = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(ordered), _BATCH):
        ids, mask, targets = padded(ordered[start : start + _BATCH])
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        flat = logits[:, :-1].float().flatten(0, 1)
        total += float(torch.nn.functional.cross_entropy(flat, targets[:, 1:].flatten(), reduction="sum"))
        count += int((targets[:, 1:] != -100).sum())
    return total / count, count


def padded(rows: Sequence[dict[str, list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, mask, targets) of some rows, each (rows, longest), padded right."""
    width = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full_like(ids, -100)
    for line, row in enumerate(rows):
        size = len(row["input_ids"])
        ids[line, :size], mask[line, :size] = torch.tensor(row["input_ids"]), 1
        learn = torch.tensor(row["completion_mask"]).bool()
        targets[line, :size][learn] = ids[line, :size][learn]
    return ids, mask, targets


def evaluate(model: str, quant: str, rows: str, adapters: Sequence[str]) -> dict[str, Any]:
    """The losses of the base and of each adapter on the rows of a file."""
    text = Path(rows).read_text(encoding="utf-8")
    held = [json.loads(line) for line in text.split("\n") if line]
    tuned = PeftModel.from_pretrained(peer.base(model, quant, torch.float32), adapters[0], adapter_name="0")
    tuned.eval()
    with tuned.disable_adapter():
        before, count = loss(tuned, held)
    found = []
    for number, folder in enumerate(adapters):
        if number:
            tuned.load_adapter(folder, adapter_name=str(number))
        tuned.set_adapter(str(number))
        found.append(loss(tuned, held)[0])
    return {"base": before, "adapters": found, "tokens": count}


def main() -> None:
    """Run as a program."""
    print(json.dumps(evaluate(**json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
