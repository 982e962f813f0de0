"""What is compared with what: two sides a case, and the settings that both sides of it share.

A further case is a further entry of CASES. Light: nothing here imports more than the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass, field

RATE, RANK, ALPHA = 1e-4, 16, 32
BETAS, EPS, CLIP, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 1.0, 0.0  # and a constant rate without a warm-up
SEQ_LEN = 512
BATCH = {"rows": 16, "full": 8}  # rows a step
WARM = 2  # steps at a run's start that no rate counts


@dataclass(frozen=True)
class Side:
    """One of a case's two: a program and its job.

    program: ftrun; trl (SFTTrainer with PEFT); hf (transformers' Trainer with PEFT). method: lora or dora, on every
    linear layer but the head. more: further overrides, for ftrun alone.
    """

    program: str
    method: str = "lora"
    quant: str = "none"  # none or nf4
    checkpointing: str = "none"  # none or all
    layers: str = "all"
    more: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        words = [self.program, self.method, "" if self.quant == "none" else self.quant]
        words += ["recomputed" if self.checkpointing == "all" else "", *self.more]
        words += [f"layers={self.layers}" if self.layers != "all" else ""]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Case:
    """Two sides in turn on the same rows. data: rows (as they are, the answer learnt) or full (of SEQ_LEN tokens, all
    learnt). epochs: passes over the rows; of several only what follows the first counts for the rate. equal: both
    learn the same, so that their held-out losses should agree.
    """

    name: str
    ours: Side
    other: Side
    data: str = "rows"
    epochs: int = 1
    equal: bool = True

    @property
    def batch(self) -> int:
        """Rows a step."""
        return BATCH[self.data]

    def first(self, steps: int) -> int:
        """The steps at the start that do not count; steps: those of one epoch."""
        return WARM if self.epochs == 1 else steps


def _against(name: str, peer: str, data: str = "rows", **job: str) -> Case:
    return Case(name, Side("ftrun", **job), Side(peer, **job), data)  # type: ignore[arg-type]


_RECOMPUTED = Side("ftrun", checkpointing="all")
_CASES = (
    _against("lora", "trl"),
    _against("qlora-ckpt", "trl", quant="nf4", checkpointing="all"),
    _against("dora-ckpt", "trl", method="dora", checkpointing="all"),
    Case("dora-lora", Side("ftrun", "dora", checkpointing="all"), _RECOMPUTED, equal=False),
    _against("full-rows", "hf", "full"),
    Case("last8", Side("ftrun", layers="last:8"), Side("ftrun"), equal=False),
    # from the second epoch on, with what the layers below give kept from the first
    Case("last8-kept", Side("ftrun", layers="last:8"), Side("ftrun"), epochs=2, equal=False),
    # not among those run by default
    _against("full-rows-ckpt", "hf", "full", checkpointing="all"),
    _against("full-rows-dora", "hf", "full", method="dora", checkpointing="all"),
    _against("lora-ckpt", "trl", checkpointing="all"),
)
CASES = {case.name: case for case in _CASES}
USUAL = ("lora", "qlora-ckpt", "dora-ckpt", "dora-lora", "full-rows", "last8", "last8-kept")
