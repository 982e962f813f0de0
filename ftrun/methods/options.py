"""The options that LoRA and DoRA share. Light: read before torch is."""

from __future__ import annotations

from dataclasses import dataclass

from ftrun.errors import UserError
from ftrun.schema import option
from ftrun.selection import check_targets, parse_layers


@dataclass(frozen=True)
class LowRankOptions:
    """The update's size, scale and place."""

    rank: int = option(16, "rank r of the update: r · (in + out) parameters a weight", ge=1)
    alpha: float = option(32, "the update's scale is alpha / rank", gt=0)
    dropout: float = option(0.0, "share of the input that the update does not see in training", ge=0, lt=1)
    rslora: bool = option(False, "scale by alpha / sqrt(rank), which keeps large ranks learning")
    targets: str | list[str] = option("all", "which weights: attention, mlp, all, qv, names, re:PATTERN")
    layers: str | int | list[str | int] = option("all", "which decoder layers: all, 0-7, last:8, first:8, every:2")
    rank_pattern: dict[str, int] = option({}, "other ranks, by layers (last:4) or a pattern on module names", ge=1)
    alpha_pattern: dict[str, float] = option({}, "other alphas, by layers or a pattern on module names", gt=0)
    modules_to_save: list[str] = option([], "modules trained in full beside the update", choices=("embeddings", "head"))
    init: str = option("kaiming", "how A starts; B starts at zero", choices=("kaiming", "gaussian"))
    dtype: str = option("float32", "dtype of what is trained", choices=("float32", "bfloat16"))
    from_: str | None = option(None, "folder of an adapter to start from", alias="from")

    def __post_init__(self) -> None:
        parts = check_targets(self.targets)
        parse_layers(self.layers)
        twice = sorted(set(parts) & set(self.modules_to_save))
        if twice:
            raise UserError(
                f"method.modules_to_save={self.modules_to_save}: {twice[0]} is also in targets={self.targets}; a "
                "module is trained in full or by an update, not by both"
            )
