"""The options that every data format shares. Light: read before anything heavy is imported."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from ftrun.errors import UserError, unknown
from ftrun.schema import option

# the columns that a row's shape is recognised by, as `data.columns` names them
COLUMNS = (
    "messages",
    "conversations",
    "tools",
    "system",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "history",
    "question",
    "answer",
    "text",
)


@dataclass(frozen=True)
class DataOptions:
    """What becomes of a row, whatever file it came from."""

    # options that have no effect in a format: changing one is an error
    FIXED: ClassVar[tuple[str, ...]] = ()

    columns: dict[str, str] = option({}, "our column to the data's own, {prompt: question}; {} = recognised")
    loss_on: str = option(
        "assistant",
        "learnt: each assistant turn, the last one alone (completion), or every token (all)",
        choices=("assistant", "completion", "all"),
    )
    template: str | None = option(None, "chat template: null (the tokenizer's own), chatml, plain, or a .jinja file")
    system: str | None = option(None, "system prompt for rows that bring none; null = as the template has it")
    overlong: str = option(
        "truncate",
        "rows longer than seq_len: cut at the end (plain text: split into windows), drop, or stop with an error",
        choices=("truncate", "drop", "error"),
    )
    bad_rows: str = option("error", "a row that cannot be read: stop, or leave it out", choices=("error", "skip"))
    held_out: int | float = option(0.05, "rows kept for evaluation: a share below 1, or a number; 0 = none", ge=0)
    held_out_most: int = option(500, "rows that a share may hold out at most", ge=1)
    distinct: bool = option(False, "take each row once, however often it repeats word for word")
    limit: int | None = option(None, "take the first so many rows of a source; null = all", ge=1)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            default = field.default_factory() if callable(field.default_factory) else field.default
            if field.name in self.FIXED and getattr(self, field.name) != default:
                raise UserError(f"data.{field.name} has no effect here: {type(self).__doc__}")
        for ours in self.columns:
            if ours not in COLUMNS:
                raise UserError(unknown("data.columns: the column", ours, COLUMNS))
        if self.held_out > 1 and self.held_out != int(self.held_out):
            raise UserError(
                f"data.held_out={self.held_out}: expected a share below 1 or a whole number of rows, "
                f"found a broken number (did you mean {int(self.held_out)}?)"
            )

    def apart(self) -> DataOptions | None:
        """The options that read the held-out set where the user names one of its own, else None."""
        return None

    def held_out_rows(self, rows: int) -> int:
        """How many of `rows` are held out."""
        if self.held_out == 0:
            return 0
        share = isinstance(self.held_out, float) and self.held_out < 1
        wanted = min(round(rows * self.held_out), self.held_out_most) if share else int(self.held_out)
        return max(1, wanted)


@dataclass(frozen=True)
class FileOptions(DataOptions):
    """Formats that are files."""

    path: str = option("", "a file, a folder of such files, or a glob")
    held_out_path: str | None = option(None, "a file of its own to evaluate on; null = rows held out of `path`")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise UserError(
                "data.path: expected a file, a folder of files or a glob, found nothing. Say data.path=FILE"
            )

    def apart(self) -> DataOptions | None:
        """The same options on `held_out_path`."""
        if self.held_out_path is None:
            return None
        return dataclasses.replace(self, path=self.held_out_path, held_out_path=None)
