"""Parquet, read a row group at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ftrun.data.files import digest, expand
from ftrun.data.options import FileOptions
from ftrun.data.record import Bad, Records
from ftrun.errors import UserError

SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True)
class Options(FileOptions):
    """A .parquet file, a folder of them, or a glob."""


def check(options: Options) -> None:
    """UserError where the files do not exist."""
    expand(options.path, SUFFIXES)


def fingerprint(options: Options) -> str:
    """Changes with the files' content."""
    return digest(expand(options.path, SUFFIXES))


def records(options: Options) -> Records:
    """Each row with its "file:row N", from 1."""
    for path in expand(options.path, SUFFIXES):
        yield from _rows(path)


def _rows(path: Path) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows == 0:
                yield f"{path}:row 1", Bad("the file is empty, expected rows", hopeless=True)
            row = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(batch_size=1000, row_groups=[group]):
                    for record in batch.to_pylist():
                        row += 1
                        yield f"{path}:row {row}", record
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:  # texts and dates that are none, too
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: found no readable Parquet file ({first}), expected one") from error
