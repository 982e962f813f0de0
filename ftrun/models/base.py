"""The base model before any of its weights is read: its config, its files, its tokenizer, its hash.

`open_base` asks no network and converts nothing for a model whose YAML gives its facts: that is what a plan needs.
`Base.fetch` brings the files; tokenizer, tensors and hash need them and call it.
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ftrun.errors import UserError
from ftrun.models import config as configs
from ftrun.models.digests import FileDigest, digest
from ftrun.models.options import Options
from ftrun.models.sources import folder as folders
from ftrun.models.sources import hub, package

Say = Callable[[str], None]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def open_base(options: Options, name: str, cache: Path, say: Say) -> Base:
    """The base model that `options` name. No weights are read.

    name: the choice of the group `model`, for the cache's folder. cache: ftrun's cache folder. say: takes messages.
    Raises UserError where the folder, hub id or package cannot be a base (see ftrun/models/sources, config.py).
    """
    return Base(options, name, cache, say)


class Base:
    """A base model. `config` stands from the start; `folder` and `files` once the files are at hand.

    source: "folder", "hub" or "package". dtype: that of the weights in memory. prequantised: the checkpoint's
    quantization_config where it is a bitsandbytes 4-bit one, else None.
    """

    config: PretrainedConfig
    folder: Path | None = None  # config.json, weights, tokenizer; None: planned from facts only
    prequantised: dict[str, Any] | None = None

    def __init__(self, options: Options, name: str, cache: Path, say: Say) -> None:
        self.options, self.name, self.cache, self.say = options, name, cache, say
        self.source = options.place()
        self.dtype: torch.dtype = getattr(torch, options.dtype)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._files: tuple[Path, ...] | None = None
        self._digests: dict[Path, FileDigest] = {}
        self._converted = cache / "models" / name.replace("/", "--")
        here = self._at_hand()
        if here is not None:
            self._settle(here)
        elif self._described:
            self.config = configs.from_arch(options.arch, f"conf/model/{name}.yaml: arch")
        else:
            self._settle(self._get(weights=False), whole=False)

    def fetch(self) -> Base:
        """Brings the files here: downloads, converts, or checks the folder. Raises UserError where that fails."""
        if self.folder is None:
            self._settle(self._get(weights=True))
        return self

    @property
    def files(self) -> tuple[Path, ...] | None:
        """The safetensors files, checked, in order; None where they are not at hand. Raises UserError if damaged."""
        if self.folder is not None and self._files is None:
            self._files = folders.weight_files(self.folder)
        return self._files

    def tensors(self) -> dict[str, Path]:
        """Each stored tensor's name, and the file that holds it. Fetches."""
        return folders.tensor_files(self.fetch().files or ())

    @property
    def has_tokenizer(self) -> bool:
        """Whether `tokenizer()` answers without a network."""
        return self._tokenizer is not None or self.source == "package" or _has_tokenizer(self._small_files())

    @property
    def tokenizer_at_hand(self) -> bool:
        """Whether `tokenizer()` answers at once: without a network, and without a conversion."""
        return self._tokenizer is not None or _has_tokenizer(self._small_files())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with `new_tokens` added; the same object each time. Raises UserError where there is none."""
        if self._tokenizer is None:
            self._tokenizer = self._add_tokens(self._read_tokenizer())
        return self._tokenizer

    @property
    def rows(self) -> int:
        """Rows of the embedding. New tokens first take rows that the model has to spare, as many families do."""
        stored = int(self.config.get_text_config().vocab_size)
        if not self.options.new_tokens:
            return stored
        if self.has_tokenizer:
            return max(stored, len(self.tokenizer()))
        return stored + len(self.options.new_tokens)

    def hash(self) -> str:
        """SHA-256 of the weights, in hex: of the one file, else of the list that sha256sum prints for the shards.

        Streamed, and kept in the cache by each file's path, size and time. Fetches.
        """
        found = self.digests()
        if len(found) == 1:
            return next(iter(found.values())).whole
        listed = "".join(f"{one.whole}  {path.name}\n" for path, one in found.items())
        return hashlib.sha256(listed.encode()).hexdigest()

    def digests(self, fresh: bool = False) -> dict[Path, FileDigest]:
        """Each file's hash and those of its tensors. fresh: read the bytes, whatever the cache knows. Fetches."""
        files = self.fetch().files or ()
        for path in files:
            if fresh or path not in self._digests:
                self._digests[path] = digest(path, self.cache, self.say, fresh)
        return {path: self._digests[path] for path in files}

    @property
    def reference(self) -> str:
        """What others call this base: its hub id, else its folder."""
        if self.source == "folder":
            return str(Path(str(self.options.path)).resolve())
        return str(self.options.path or self.options.hub)

    def describe(self, hashed: bool = True) -> dict[str, Any]:
        """Where the weights come from, for result.json and provenance. `hashed=False` leaves the hash out (None)."""
        scheme = "bitsandbytes 4-bit" if self.prequantised else None
        if self.source == "package":
            scheme = "4-bit GGUF (Q4_1, Q8_0), dequantised to bfloat16: not the hub's weights"
        return {
            "name": self.name,
            "source": self.source,
            "path": self.reference,
            "package": self.options.package if self.source == "package" else None,
            "revision": self._revision() if self.source == "hub" else None,
            "folder": str(self.folder) if self.folder else None,
            "hash": self.hash() if hashed and self.folder else None,
            "license": None if self.options.path and self.options.arch else self.options.license,
            "dtype": self.options.dtype,
            "stored_as": scheme,
        }

    @property
    def _described(self) -> bool:
        """Whether the YAML's facts speak of this model: they do not where the user gave a path of their own."""
        return self.options.path is None and bool(self.options.arch)

    @property
    def _repo(self) -> str:
        return str(self.options.path or self.options.hub)

    def _at_hand(self) -> Path | None:
        """The folder with all files, if it is on this machine."""
        if self.source == "folder":
            return Path(str(self.options.path)).expanduser()
        if self.source == "package":
            found = package.at_hand(str(self.options.package), self._converted)
            return self._converted if found else None
        snapshot = hub.at_hand(self._repo, self.options.revision)
        return snapshot if snapshot is not None and _is_whole(snapshot) else None

    def _get(self, *, weights: bool) -> Path:
        if self.source == "package":
            return self._convert()
        trusted = self.options.trust_remote_code
        return hub.fetch(self._repo, self.options.revision, weights=weights, code=trusted, say=self.say)

    def _convert(self) -> Path:
        """The package's model as a folder: in the cache, or for this process alone where the cache takes nothing."""
        name, arch = str(self.options.package), self.options.arch
        try:
            return package.convert(name, arch, self._converted, self.say)
        except OSError as error:
            self.say(f"warning: the converted base is not kept in {self._converted.parent}: {error.strerror or error}")
        made = Path(tempfile.mkdtemp(prefix="ftrun-"))
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        self._converted = made / self._converted.name
        return package.convert(name, arch, self._converted, self.say)

    def _settle(self, folder: Path, whole: bool = True) -> None:
        """Takes the config of `folder`, and the folder itself where it holds the weights as well."""
        facts = folders.read_facts(folder)
        self.config = configs.from_folder(folder, facts, self.options.trust_remote_code)
        self.prequantised = configs.check_quantised(facts, folder / "config.json")
        self.folder = folder if whole else None
        if self._described:
            self._compare()

    def _compare(self) -> None:
        """Says where the files contradict the YAML, by whose facts a plan may have been made."""
        for key, value in self.options.arch.items():
            found = getattr(self.config, key, value)
            if isinstance(value, int | float | str) and found != value:
                self.say(f"{self.name}: config.json has {key}={found}, the YAML {value}; config.json counts")

    def _small_files(self) -> Path | None:
        if self.folder is not None:
            return self.folder
        return hub.at_hand(self._repo, self.options.revision) if self.source == "hub" else None

    def _read_tokenizer(self) -> PreTrainedTokenizerBase:
        folder = self._small_files()
        if not _has_tokenizer(folder):
            folder = self._get(weights=False) if self.source != "folder" else folder
        if not _has_tokenizer(folder):
            wanted = ", ".join(_TOKENIZER_FILES[:3])
            raise UserError(f"{folder}: no tokenizer (one of {wanted}); copy its files there from the base model")
        if self.source == "package" and self.folder is None and folder is not None:
            self._settle(folder)
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=self.options.trust_remote_code)
        except Exception as error:  # the tokenizers' own reader raises no other kind
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"{folder}: the tokenizer cannot be read: {why}") from error

    def _add_tokens(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        known = tokenizer.get_vocab()
        for token in self.options.new_tokens:
            if token in known:
                raise UserError(f"model.new_tokens: {token!r} is in the vocabulary already, as {known[token]}")
        tokenizer.add_tokens(list(self.options.new_tokens))
        return tokenizer

    def _revision(self) -> str | None:
        """The commit, where the files are at hand: a snapshot's folder is named by it."""
        return self.folder.name if self.folder else self.options.revision


def _is_whole(snapshot: Path) -> bool:
    """Whether a download ran to its end: an interrupted one is taken up again by `fetch`."""
    try:
        return bool(folders.weight_files(snapshot))
    except UserError:
        return False


def _has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and any((folder / name).is_file() for name in _TOKENIZER_FILES)
