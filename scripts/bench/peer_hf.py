"""transformers' Trainer with PEFT: rows of one length, loss on every token.

Run as python -m scripts.bench.peer_hf JSON; scripts/bench/peer.py says what that holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import Trainer, TrainingArguments

from scripts.bench import peer


def trainer(job: peer.Asked, model: Any, lines: peer.StepLines) -> Trainer:
    """The trainer on the token ids of job["rows"]."""
    if job["quant"] == "nf4":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=job["checkpointing"])
    model = get_peft_model(model, peer.adapter(job["method"]))
    text = Path(job["rows"]).read_text(encoding="utf-8")
    ids = [json.loads(line)["input_ids"] for line in text.split("\n") if line]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    return Trainer(model, TrainingArguments(**peer.settings(job)), train_dataset=rows, callbacks=[lines])


def main() -> None:
    """Run as a program."""
    job = peer.asked()
    peer.run(job, lambda lines: trainer(job, peer.base(job["model"], job["quant"]), lines))


if __name__ == "__main__":
    main()
