"""A folder written by `datasets.save_to_disk`: Arrow files, read as they lie there, without running any code."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ftrun.data.files import digest, missing
from ftrun.data.options import DataOptions
from ftrun.data.record import Bad, Records
from ftrun.errors import UserError, unknown
from ftrun.schema import option


@dataclass(frozen=True)
class Options(DataOptions):
    """A `datasets.save_to_disk` folder, of one split or of several."""

    path: str = option("", "the folder")
    split: str = option("train", "which split to train on, where the folder has several")
    held_out_split: str | None = option(None, "the split to evaluate on; null = rows held out of `split`")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise UserError("data.path: expected a folder of datasets.save_to_disk, found nothing. Say data.path=DIR")

    def apart(self) -> DataOptions | None:
        """The same options on `held_out_split`."""
        if self.held_out_split is None:
            return None
        return dataclasses.replace(self, split=self.held_out_split, held_out_split=None)


def check(options: Options) -> None:
    """UserError where there is no such folder or split."""
    _files(options)


def fingerprint(options: Options) -> str:
    """Changes with the files' content."""
    return digest(_files(options))


def records(options: Options) -> Records:
    """Each row with its "folder:row N", from 1."""
    import pyarrow as pa

    row = 0
    for file in _files(options):
        try:
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
                for batch in stream:
                    for record in batch.to_pylist():
                        row += 1
                        yield f"{file.parent}:row {row}", record
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{file}: found no readable Arrow file ({error}), expected one") from error
    if row == 0:
        yield f"{options.path}:row 1", Bad("the folder is empty, expected rows", hopeless=True)


def _files(options: Options) -> list[Path]:
    folder = Path(os.path.expanduser(options.path))
    if not os.path.isdir(folder):
        raise missing(options.path)
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = _read(splits).get("splits", [])
        if options.split not in names:
            raise UserError(unknown(f"data.split: {folder}: the split", options.split, names))
        folder = folder / options.split
    state = folder / "state.json"
    if not state.is_file():
        raise UserError(
            f"data.path={options.path}: found no state.json or dataset_dict.json, expected a folder written by "
            "datasets.save_to_disk. A folder of .jsonl files is read by data=jsonl (csv, parquet, json, text alike)"
        )
    return [folder / Path(entry["filename"]).name for entry in _read(state).get("_data_files", [])]


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: found no readable JSON ({error}), expected what datasets.save_to_disk writes"
        ) from error
