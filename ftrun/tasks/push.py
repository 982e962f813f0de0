"""Upload what a run has learnt to the Hugging Face hub: only when asked, and what goes is listed first.

what=adapter (of method=full: the model) takes the learnt files, their provenance, the run's card as README.md and its
job.yaml; what=DIR takes the merged model that `ftrun merge` has written there, with the card. Places of this machine
and where it logged are taken out of what is uploaded. dry=true lists, and asks no network.

The token is the one of `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftrun.errors import UserError
from ftrun.job import Job
from ftrun.runs import job_file, read_json
from ftrun.schema import option

# keys whose values are places; of other values only their text is the user's
_PLACES = re.compile(r"(.*_)?(path|from|out|folder|base_model_name_or_path)")
_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests")  # what versions of the hub's client stand on
_SKIPPED = (".lock", ".tmp")


@dataclass(frozen=True)
class Options:
    """What this verb takes besides the job's keys."""

    run: str | None = option(None, "the folder of a finished run")
    repo: str | None = option(None, "where to on the hub, ORG/NAME; it is made where it is not there")
    private: bool = option(False, "make a new repository a private one")
    what: str = option("adapter", "adapter (of method=full: the model), or the folder of a merged model")
    dry: bool = option(False, "only list the files and sizes that would go")


def run(job: Job, run: str, repo: str | None, private: bool, what: str, dry: bool) -> int:
    """List, then upload; returns 0. Raises UserError, in one message, where the hub refuses or cannot be reached."""
    from ftrun.report.plan_text import size

    if repo is None:
        raise UserError("repo is missing: ftrun push run=DIR repo=ORG/NAME, where to on the hub")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"repo={repo}: expected ORG/NAME, the repository on the hub")
    files = contents(Path(run), repo, what)
    for name, held in files.items():
        print(f"  {size(len(held) if isinstance(held, bytes) else held.stat().st_size):>10}  {name}")
    if dry:
        print(f"{len(files)} files would go to {repo}; dry=true: nothing is uploaded")
        return 0
    url = upload(repo, private, files)
    print(f"{len(files)} files: {url}")
    return 0


def contents(run: Path, repo: str, what: str) -> dict[str, bytes | Path]:
    """Name in the repository -> the bytes, or the file, that go there. Raises UserError where there is nothing to go.

    JSON of ours and job.yaml are rewritten without places of this machine.
    """
    from ftrun.tasks.card import FILE
    from ftrun.tasks.check import learnt

    result = read_json(run / "result.json")
    if result is None or result.get("status") != "finished":
        raise UserError(f"run={run}: it is not at its end: there is no result to upload")
    if "blend" in result:
        raise UserError(
            f"run={run}: a blend of adapters has no training for a card to tell; hf upload takes {run}/adapter"
        )
    whole = what != "adapter"
    folder = Path(what).expanduser() if whole else learnt(run)
    if not (folder / ("config.json" if folder.name != "adapter" or whole else "adapter_config.json")).is_file():
        raise UserError(f"what={what}: expected adapter, or the folder of a merged model (it has a config.json)")
    found: dict[str, bytes | Path] = {FILE: _card(run, repo, whole)}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(".") and not name.endswith(_SKIPPED) and name != FILE:
            found[name] = _shareable_json(path) if path.name in ("adapter_config.json", "provenance.json") else path
    job = yaml.safe_load(job_file(run).read_text(encoding="utf-8"))
    job["choices"] = {**job["choices"], "log": "none"}
    found["job.yaml"] = yaml.safe_dump({**shareable(job), "log": {"kind": "none"}}, sort_keys=False).encode()
    return found


def shareable(value: Any, key: str = "") -> Any:
    """Values without this machine's places: a whole path becomes its last name, a cache's folder goes."""
    from ftrun.report.card import shown

    if isinstance(value, Mapping):
        return {k: shareable(v, str(k)) for k, v in value.items() if k != "folder" or not isinstance(v, str)}
    if isinstance(value, list):
        return [shareable(item, key) for item in value]
    return shown(value) if isinstance(value, str) and _PLACES.fullmatch(key) else value


def _card(run: Path, repo: str, whole: bool) -> bytes:
    """Raises UserError where the run's files do not tell what a card tells."""
    from ftrun.report.card import card
    from ftrun.tasks.card import facts_of

    try:
        return card(facts_of(run, repo, whole)).encode()
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        why = f"its result.json or job.yaml holds no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"run={run}: no card can be made of it: {why}") from error


def _shareable_json(path: Path) -> bytes:
    facts = read_json(path)
    return (json.dumps(shareable(facts), indent=2, sort_keys=True) + "\n").encode()


def upload(repo: str, private: bool, files: Mapping[str, bytes | Path]) -> str:
    """One commit of all files; returns its address. Raises UserError."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    if constants.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set: the hub is not asked. Unset it (HF_HUB_OFFLINE=0) to upload")
    token = get_token()
    if not token:
        raise UserError("no token for the hub: hf auth login, or set HF_TOKEN (a token that may write)")
    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    with _explained(repo, token, constants.ENDPOINT):
        api.create_repo(repo, private=private, exist_ok=True)
        added = [
            CommitOperationAdd(name, held if isinstance(held, bytes) else str(held)) for name, held in files.items()
        ]
        made = api.create_commit(repo, added, commit_message="Upload by ftrun push")
    return str(made.commit_url)


@contextmanager
def _explained(repo: str, token: str, endpoint: str) -> Iterator[None]:
    """What the hub's client raises, as one message without the token."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        raise UserError(_refused(error, repo, lambda text: text.replace(token, "***"))) from None
    except (errors.HFValidationError, ValueError) as error:
        raise UserError(f"repo={repo}: {str(error).splitlines()[0].replace(token, '***')}") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in _CLIENTS and not isinstance(error, ConnectionError):
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0].replace(token, "***")
        raise UserError(f"{endpoint}: the hub cannot be reached: {why}. Nothing was uploaded") from None


def _refused(error: Any, repo: str, clean: Callable[[str], str]) -> str:
    status = int(getattr(error.response, "status_code", 0))
    said = clean((str(getattr(error, "server_message", None) or error).splitlines() or [""])[0])
    known = {
        401: "the hub does not know the token: hf auth login, with one that may write",
        403: f"the token may not write to {repo}: use one of an account that may, or another repo",
        404: f"the hub has no place {repo}: does the organisation exist, and is the account in it?",
    }
    return f"repo={repo}: {known.get(status, 'the hub refuses it')} (HTTP {status}: {said})"
