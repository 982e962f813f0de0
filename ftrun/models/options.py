"""What the group `model` takes. Light: read before anything heavy is imported."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.errors import UserError, nearest
from ftrun.schema import option

SOURCES = ("hub", "folder", "package")


@dataclass(frozen=True)
class Options:
    """The base model: which one, from where, in which precision."""

    path: str | None = option(None, "a folder of your own, or a hub id; null: the model that the YAML describes")
    source: str = option("hub", "where the YAML's own model comes from; a path given wins", choices=SOURCES)
    hub: str | None = option(None, "hub id of the model that the YAML describes")
    package: str | None = option(None, "distribution that ships its weights as one GGUF file, NAME==VERSION")
    revision: str | None = option(None, "branch, tag or commit on the hub; null: its main branch")
    dtype: str = option("bfloat16", "precision of the weights in memory", choices=("bfloat16", "float32"))
    license: str | None = option(None, "licence of the weights")
    trust_remote_code: bool = option(False, "run the Python code that a model's files bring along")
    new_tokens: list[str] = option([], "tokens to add to the vocabulary")
    arch: dict[str, Any] = option({}, "facts of the architecture, named as in transformers' config; {}: from the files")

    def __post_init__(self) -> None:
        form = "DIR" if self.source == "folder" else "ORG/NAME"
        if self.path is not None and not self.path.strip():
            raise UserError(f"model.path= is empty: name the model, model.path={form}")
        if self.path is None and (self.hub is None or self.source == "folder"):
            raise UserError(f"model.path is missing: name the model, model.path={form}")
        if self.path is None and self.source == "package" and self.package is None:
            raise UserError("model.source=package: no package ships this model; use model.source=hub")
        if self.package is not None and not re.fullmatch(r"[\w.-]+==[\w.]+", self.package):
            raise UserError(f"model.package={self.package}: expected NAME==VERSION")
        if self.arch and "model_type" not in self.arch:
            raise UserError("model.arch: model_type is missing (llama, qwen3, …: what transformers calls the family)")
        for token in self.new_tokens:
            if not token or self.new_tokens.count(token) > 1:
                raise UserError(f"model.new_tokens: {token!r} is {'named twice' if token else 'no token'}")

    def check(self) -> None:
        """UserError where `path` is neither a folder nor has the form of a hub id."""
        self.place()

    def place(self) -> str:
        """One of SOURCES: where the model comes from. Raises UserError as `check` does."""
        if self.path is None:
            return self.source
        if os.path.isdir(Path(self.path).expanduser()):
            return "folder"
        if self.source == "folder" or not is_hub_id(self.path):
            raise UserError(f"model.path={self.path}: no such folder{_neighbour(Path(self.path).expanduser())}")
        return "hub"


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form of a hub id, NAME or ORG/NAME."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) is not None


def _neighbour(path: Path) -> str:
    if os.path.isfile(path):
        return "; it is a file. Give the folder that holds config.json and the weights"
    beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if os.path.isdir(path.parent) else []
    close = nearest(path.name, beside)
    return f". Did you mean {path.parent / close}?" if close else ""
