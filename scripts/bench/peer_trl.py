"""TRL's SFTTrainer with PEFT: rows of varying length, loss on the answer only.

Run as python -m scripts.bench.peer_trl JSON; scripts/bench/peer.py says what that holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from scripts.bench import peer
from scripts.bench.cases import SEQ_LEN


def trainer(job: peer.Asked, model: Any, lines: peer.StepLines) -> SFTTrainer:
    """The trainer on the tokenised rows of job["rows"]."""
    text = Path(job["rows"]).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    return SFTTrainer(
        model,
        SFTConfig(max_length=SEQ_LEN, completion_only_loss=True, packing=False, **peer.settings(job)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=peer.adapter(job["method"]),
        callbacks=[lines],
    )


def main() -> None:
    """Run as a program."""
    job = peer.asked()
    peer.run(job, lambda lines: trainer(job, peer.base(job["model"], job["quant"]), lines))


if __name__ == "__main__":
    main()
