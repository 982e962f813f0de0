"""Options that every optimiser has. Light: read before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ftrun.errors import UserError
from ftrun.schema import option


@dataclass(frozen=True)
class OptimOptions:
    """What does not depend on the optimiser's own maths: decay, clipping, the schedule of the rate."""

    weight_decay: float = option(0.0, "decoupled decay: each step takes lr x this from a weight", ge=0)
    clip: float | None = option(1.0, "largest norm of all gradients together; null = no clipping", gt=0)
    schedule: str = option(
        "cosine", "how the rate falls after the warm-up, to 0", choices=("constant", "linear", "cosine")
    )
    warmup: int | float = option(0.03, "steps of rising rate: below 1 a fraction of the run, else a number", ge=0)
    lora_plus: float = option(1.0, "LoRA+: the rate of B over that of A; 1 = the same", gt=0)

    gathers_below: ClassVar[int] = 0  # elements: smaller parameters of a layer are gathered into one (optim/gather.py)
    by_tensor: ClassVar[bool] = False  # a weight's update depends on all of its tensor: no part will do
    by_gradient: ClassVar[bool] = False  # steps in proportion to the gradient; else by the rate, whatever its size

    def __post_init__(self) -> None:
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise UserError(
                f"optim.warmup={self.warmup}: expected a fraction below 1 or a whole number of steps, found neither"
            )

    def notes(self, device: str) -> list[str]:
        """Lines for the user on what cannot take effect on `device` ("cpu" or "cuda")."""
        return []


def check_betas(betas: tuple[float, ...]) -> None:
    """UserError unless there are two: the schema has checked each one's bounds."""
    if len(betas) != 2:
        raise UserError(f"optim.betas={list(betas)}: expected two numbers [b1,b2], found {len(betas)}")
