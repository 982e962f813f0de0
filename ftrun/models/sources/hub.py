"""A model from the Hugging Face hub: only safetensors, JSON and the tokenizer's files are fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import errors, snapshot_download

from ftrun.errors import UserError

SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
WEIGHTS = ("*.safetensors",)
# a second copy of the weights, in the makers' own layout
_IGNORED = ("original/*", "consolidated*", "*/*.safetensors", "onnx/*", "*.gguf")


def at_hand(repo: str, revision: str | None) -> Path | None:
    """The snapshot of the model in the local hub cache, or None. Asks no network."""
    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None


def fetch(repo: str, revision: str | None, *, weights: bool, code: bool, say: Callable[[str], None]) -> Path:
    """The snapshot's folder, downloaded where it is not at hand; without `weights` only the small files.

    Raises UserError where the hub has no such model, keeps it behind a licence, or cannot be reached.
    """
    patterns = [*SMALL, *(WEIGHTS if weights else ()), *(("*.py",) if code else ())]
    if weights:
        say(f"fetching {repo} from the hub")
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=[*_IGNORED]))
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{repo}"
        raise UserError(
            f"{repo}: its makers ask you to accept a licence. Do so at {page}, then: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"model.revision={revision}: {repo} has no such branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{repo}: neither a folder here nor a model on the hub (private ones need: hf auth login)"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"{repo}: no folder here, not in this machine's hub cache, and the hub cannot be reached. Elsewhere:"
            f" hf download {repo}; copy that folder here and give model.path=DIR"
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise UserError(f"{repo}: the hub answered: {str(error).splitlines()[0]}") from error
