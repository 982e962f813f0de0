"""A data set of the Hugging Face hub, streamed; data only: nothing of the repository's code is run."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from ftrun.data.options import DataOptions
from ftrun.data.record import Records
from ftrun.errors import UserError, unknown
from ftrun.schema import option

_CLIENTS = ("httpx", "httpx2", "httpcore", "requests", "aiohttp")  # what versions of the hub's client stand on
# builders of `datasets` that read plain data; others decode media or run what they find
_READERS = ("parquet", "json", "csv", "text", "arrow")


REMOTE = True  # its rows are fetched: a plan does without


@dataclass(frozen=True)
class Options(DataOptions):
    """A data set's id, "owner/name"."""

    path: str = option("", 'the id on the hub, "owner/name"', pattern=r"|[\w.-]+(/[\w.-]+)?")
    name: str | None = option(None, "the configuration, where the data set has several")
    split: str = option("train", "the split to train on")
    revision: str | None = option(None, "branch, tag or commit; null = the newest")
    held_out_split: str | None = option(None, "the split to evaluate on; null = rows held out of `split`")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise UserError("data.path: expected a data set's id, found nothing. Say data.path=owner/name")

    def apart(self) -> DataOptions | None:
        """The same options on `held_out_split`."""
        if self.held_out_split is None:
            return None
        return dataclasses.replace(self, split=self.held_out_split, held_out_split=None)


def fingerprint(options: Options) -> str:
    """The commit on the hub, so that the same content is tokenised once."""
    return f"{options.path}@{_commit(options.path, options.revision)}:{options.name}:{options.split}"


def records(options: Options) -> Records:
    """Each row with its "owner/name:row N", streamed at the commit that `fingerprint` names."""
    rows = _open(options)
    try:
        for row, record in enumerate(rows, start=1):
            yield f"{options.path}:row {row}", dict(record)
    except Exception as error:
        if not _of_the_network(error):
            raise
        raise _unreachable(options.path, error) from error


@functools.cache
def _commit(path: str, revision: str | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(HfApi().dataset_info(path, revision=revision, timeout=20).sha)
    except RevisionNotFoundError as error:
        raise UserError(f"data.revision={revision}: the hub's data set {path} has no such revision") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"data.path={path}: the hub has no such data set, or it is private (huggingface-cli login). "
            "A file on this machine is read by data=jsonl (json, csv, parquet, text, folder alike)"
        ) from error
    except Exception as error:
        if not _of_the_network(error):
            raise
        raise _unreachable(path, error) from error


def _open(options: Options) -> Any:
    import datasets

    commit = _commit(options.path, options.revision)
    try:
        builder = datasets.load_dataset_builder(options.path, options.name, revision=commit)
        reader = type(builder).__module__.rsplit(".", 1)[-1]
        if reader not in _READERS:
            raise UserError(
                f"data.path={options.path}: found a data set of the kind {reader!r}, "
                f"expected plain data: {', '.join(_READERS)}"
            )
        splits = builder.as_streaming_dataset()
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"data.path={options.path}: {str(error).splitlines()[0]}") from error
    except Exception as error:
        if isinstance(error, UserError) or not _of_the_network(error):
            raise
        raise _unreachable(options.path, error) from error
    if options.split not in splits:
        raise UserError(unknown(f"data.split: {options.path}: the split", options.split, splits))
    return splits[options.split]


def _of_the_network(error: Exception) -> bool:
    return isinstance(error, OSError) or any(c.__module__.split(".")[0] in _CLIENTS for c in type(error).__mro__)


def _unreachable(path: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"data.path={path}: the hub cannot be reached ({reason}). Offline, give the data as files: save it where there "
        "is a network with datasets.load_dataset(…).save_to_disk(DIR), then data=folder data.path=DIR"
    )
