"""What the two peers share: the base, the adapter's settings, the trainer's, and a line for each step.

Plain transformers and PEFT, as a user would write it, with the settings of cases.py. Nothing of ftrun's is imported.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from scripts.bench import cases

Asked = dict[str, Any]  # model, rows, out, method, quant, checkpointing, steps, batch, save_every


def asked() -> Asked:
    """What the command line's JSON says; all cores are used unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    found = json.loads(sys.argv[1])
    Path(found["out"]).mkdir(parents=True, exist_ok=True)
    return found


def base(model: str, quant: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The base in bfloat16, or in NF4 with double quantisation; dtype: what it computes in."""
    stored = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    how = {"quantization_config": stored} if quant == "nf4" else {}
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **how)


def adapter(method: str) -> LoraConfig:
    """PEFT's settings: every linear layer but the head."""
    return LoraConfig(
        r=cases.RANK,
        lora_alpha=cases.ALPHA,
        lora_dropout=0.0,
        target_modules="all-linear",
        use_dora=method == "dora",
        task_type="CAUSAL_LM",
    )


def settings(job: Asked) -> dict[str, Any]:
    """What transformers' Trainer and TRL's are told, by the same names."""
    return {
        "output_dir": str(Path(job["out"]) / "trainer"),
        "per_device_train_batch_size": job["batch"],
        "max_steps": job["steps"],
        "train_sampling_strategy": "sequential",  # the rows come in ftrun's order
        "learning_rate": cases.RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "adam_beta1": cases.BETAS[0],
        "adam_beta2": cases.BETAS[1],
        "adam_epsilon": cases.EPS,
        "weight_decay": cases.WEIGHT_DECAY,
        "max_grad_norm": cases.CLIP,
        "bf16": True,
        "use_cpu": True,
        "gradient_checkpointing": job["checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if job["checkpointing"] else None,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "steps",
        "save_steps": job["save_every"],
        "disable_tqdm": True,
        "seed": 0,
    }


class StepLines(TrainerCallback):
    """Writes a line for each step as it ends, as ftrun's metrics.jsonl has them."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")
        self.counts: list[tuple[int, int]] = []  # real tokens and supervised ones of each batch as it was made

    def count(self, batch: Any) -> None:
        """Notes the tokens of a batch."""
        mask = batch.get("attention_mask")
        real = int(mask.sum()) if mask is not None else batch["input_ids"].numel()
        self.counts.append((real, int((batch["labels"][:, 1:] != -100).sum())))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tokens, supervised = self.counts[state.global_step - 1]
        line = {"step": state.global_step, "tokens": tokens, "supervised_tokens": supervised}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def run(job: Asked, build: Callable[[StepLines], Any]) -> None:
    """Train with the trainer that `build` makes, and leave the adapter and a note of what trained."""
    out = Path(job["out"])
    lines = StepLines(out / "metrics.jsonl")
    trainer = build(lines)
    collate = trainer.data_collator

    def counted(rows: Any) -> Any:
        batch = collate(rows)
        lines.count(batch)
        return batch

    trainer.data_collator = counted
    trainer.train()
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    dtypes = sorted({str(p.dtype) for p in trained.values()})
    note = {"trained": sum(p.numel() for p in trained.values()), "dtypes": dtypes, "losses": losses}
    (out / "note.json").write_text(json.dumps(note), encoding="utf-8")
    with _quiet():
        trainer.model.save_pretrained(out / "adapter")


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT asks the hub after a base that it knows by name; there is none to ask."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is not None:
            os.environ["HF_HUB_OFFLINE"] = before
