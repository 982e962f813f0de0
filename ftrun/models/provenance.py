"""What a trained adapter belongs to, as its provenance.json has it, and in what the base at hand differs from it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftrun.errors import UserError
from ftrun.models.base import Base

FILE = "provenance.json"
_NAMED = 3  # tensors named in a message


@dataclass(frozen=True)
class Drift:
    """One difference. what: weights, revision, dtype, quantisation, tokenizer or template."""

    what: str
    recorded: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.recorded} when it was trained, {self.found} now. {self.remedy}"


def record(base: Base, scheme: str, fresh: bool = False) -> dict[str, Any]:
    """What stands for a base as a job uses it: whence it is, its weights' hashes, its tokenizer's, how it is stored.

    scheme: the quantiser's. fresh: the weights are read again, whatever the cache knows. Fetches.
    """
    found = base.digests(fresh)
    return {
        "base": base.describe(),
        "quantisation": scheme,
        "tokenizer": tokenizer_hash(base.tokenizer()),
        "template": template_hash(base.tokenizer()),
        "tensors": {name: one for each in found.values() for name, one in each.tensors.items()},
    }


def versions() -> dict[str, str]:
    """Of the packages at work, by their names."""
    packages = ("ftrun", "torch", "transformers", "bitsandbytes", "safetensors")
    return {name: importlib.metadata.version(name) for name in packages}


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what maps text to tokens; how rows are cut and padded is not part of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        facts = {"vocabulary": sorted(tokenizer.get_vocab().items()), "kind": type(tokenizer).__name__}
    else:
        facts = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    facts["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def template_hash(tokenizer: Any) -> str | None:
    """SHA-256 of the chat template; None where there is none."""
    text = tokenizer.chat_template
    return None if text is None else hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()


def drifts(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[Drift]:
    """In what the base at hand differs from the one on record; what an older record does not hold is not compared.

    Raises UserError where the record is none.
    """
    known = recorded if isinstance(recorded, Mapping) else {}
    base, here = known.get("base"), now["base"]
    if not isinstance(base, Mapping) or not isinstance(known.get("tensors", {}), Mapping):
        raise UserError(f"{FILE}: expected a record with the base's facts in `base`, found none")
    found = [_revision(base, here), _weights(recorded, now), _quantisation(recorded, now)]
    for key, remedy in (
        ("tokenizer", "Other tokens mean other rows: give the tokenizer's files that it was trained with"),
        ("template", "Prompts are framed otherwise: give the chat template that it was trained with"),
    ):
        if key in recorded and recorded[key] != now[key]:
            found.append(Drift(key, _short(recorded[key]), _short(now[key]), remedy))
    return [one for one in found if one is not None]


def _revision(base: Mapping[str, Any], here: Mapping[str, Any]) -> Drift | None:
    old, new = base.get("revision"), here["revision"]
    if not old or not new or old == new:
        return None
    return Drift("revision", f"{base.get('path')} at {old}", f"{here['path']} at {new}", f"Set model.revision={old}")


def _weights(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Drift | None:
    """Files may be cut otherwise: what counts is the tensors, where they are on record."""
    base, here = recorded["base"], now["base"]
    if not base.get("hash") or base["hash"] == here["hash"]:
        return None
    old, new = recorded.get("tensors"), now["tensors"]
    if old and old == new:
        return None
    remedy = f"Give the base that it was trained on: {described(base)}"
    if not old:
        return Drift("weights", f"sha256 {_short(base['hash'])}", f"sha256 {_short(here['hash'])}", remedy)
    return Drift("weights", f"sha256 {_short(base['hash'])}", _told(old, new), remedy)


def _told(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Which tensors are others, or missing, or new."""
    changed = [n for n in old if n in new and old[n] != new[n]]
    groups = (("other", changed), ("missing", old.keys() - new.keys()), ("new", new.keys() - old.keys()))
    return "; ".join(
        f"{len(names)} of {len(old)} tensors {word}: {_some(sorted(names))}" for word, names in groups if names
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def _quantisation(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Drift | None:
    old, new = recorded.get("quantisation"), now["quantisation"]
    if old is None or old == new:
        return None
    return Drift("quantisation", str(old), str(new), "Store the base as it was: the quant of the run's job.yaml")


def described(base: Mapping[str, Any]) -> str:
    """A base on record in a few words: its name, where it is from, its hash."""
    revision = f" at {base['revision']}" if base.get("revision") else ""
    return f"{base.get('name')} ({base.get('source')}: {base.get('path')}{revision}), sha256 {_short(base.get('hash'))}"


def _short(digest: Any) -> str:
    return "none" if not digest else str(digest)[:16]
