"""Several sources, mixed by weight."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ftrun.data.options import DataOptions
from ftrun.data.record import Part, Records
from ftrun.data.sources import source
from ftrun.errors import UserError
from ftrun.schema import option


@dataclass(frozen=True)
class Options(DataOptions):
    """Sources with their shares. Each entry may set any option of its format for itself."""

    sources: list[dict[str, Any]] = option(
        [], "[{path: a.jsonl, weight: 2}, {path: b.csv}]; kind: where no suffix tells"
    )
    until: str = option(
        "all",
        "with weights: until every source was read once, smaller ones repeating (all), or until one is used up (first)",
        choices=("all", "first"),
    )
    held_out_path: str | None = option(None, "a file of its own to evaluate on; null = rows held out of the sources")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise UserError("data.sources: expected a list of sources, found none: [{path: a.jsonl, weight: 2}, …]")

    def apart(self) -> DataOptions | None:
        """`held_out_path` as the only source."""
        if self.held_out_path is None:
            return None
        return dataclasses.replace(self, sources=[{"path": self.held_out_path}], held_out_path=None)


def parts(options: Options) -> list[Part]:
    """The sources. Where one names a weight, the others weigh 1; where none does, each row counts once."""
    made = [source(entry, options, f"data.sources[{i}]") for i, entry in enumerate(options.sources)]
    if all(part.weight is None for part in made):
        return made
    return [dataclasses.replace(part, weight=1.0 if part.weight is None else part.weight) for part in made]


def records(options: Options) -> Records:
    """The sources' rows, one source after another."""
    for part in parts(options):
        yield from part.records()
