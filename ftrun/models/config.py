"""From facts to transformers' config: the facts of a YAML, or of a folder's config.json, checked before use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ftrun.errors import UserError, nearest, unknown

# read by some models whose config class does not declare it (Qwen3-MoE)
_UNDECLARED = ("model_type", "architectures", "dtype", "head_dim")
_WRONG = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, StrictDataclassError)


def from_arch(arch: dict[str, Any], where: str) -> PretrainedConfig:
    """The config that a YAML's facts describe. Raises UserError for an unknown family, fact or value."""
    family = arch["model_type"]
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(unknown(f"{where}: model_type", family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    plain = CONFIG_MAPPING[family]()
    for key in arch:
        if key not in _UNDECLARED and not hasattr(plain, key):
            known = [k for k in {**plain.to_dict(), **plain.attribute_map} if not k.startswith("_")]
            raise UserError(unknown(f"{where}: {family} has no such fact:", key, known))
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    try:
        return AutoConfig.for_model(**{"architectures": [name], **arch})
    except _WRONG as error:
        raise UserError(f"{where}: {_short(error)}") from error


def from_folder(folder: Path, facts: dict[str, Any], trusted: bool) -> PretrainedConfig:
    """The config of a folder whose config.json says `facts`. Raises UserError unless it is a decoder-only model."""
    where = folder / "config.json"
    check_family(facts, where, trusted)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    except (*_WRONG, OSError, ImportError) as error:
        raise UserError(f"{where}: {_short(error)}") from error


def check_family(facts: dict[str, Any], where: Path, trusted: bool) -> None:
    """Raises UserError unless config.json describes a text-only causal language model that can be built here."""
    family, remote = facts.get("model_type"), bool(facts.get("auto_map"))
    if isinstance(family, str) and family not in CONFIG_MAPPING and remote and trusted:
        return
    if not isinstance(family, str):
        found = "missing" if family is None else f"{family!r:.60}"
        raise UserError(f"{where}: model_type is {found}: not a transformers model")
    if family not in CONFIG_MAPPING and remote:
        raise UserError(
            f"{where}: {family} runs on Python code that comes with the model. Read that code; if you trust it,"
            " say model.trust_remote_code=true"
        )
    if family not in CONFIG_MAPPING:
        raise UserError(unknown(f"{where}: model_type", family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    if facts.get("is_encoder_decoder") or family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{where}: {family} is no decoder-only language model; ftrun tunes no other kind")
    if "vision_config" in facts or "audio_config" in facts:
        raise UserError(f"{where}: {family} reads more than text; ftrun tunes text-only models")
    _check_architecture(facts, where)


def check_quantised(facts: dict[str, Any], where: Path) -> dict[str, Any] | None:
    """The quantization_config of a bitsandbytes 4-bit checkpoint, None where weights are plain, else UserError."""
    scheme = facts.get("quantization_config")
    if not scheme:
        return None
    if not isinstance(scheme, dict):
        raise UserError(f"{where}: quantization_config: expected an object, found {scheme!r:.60}")
    kind = scheme.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in scheme else "unknown")
    if kind == "bitsandbytes" and (scheme.get("load_in_4bit") or scheme.get("_load_in_4bit")):
        return dict(scheme)
    if kind == "bitsandbytes":
        kind = "bitsandbytes 8-bit"
    raise UserError(
        f"{where}: the weights are quantised already, by {kind}. Taken are plain safetensors (ftrun quantises them:"
        " quant=nf4) and bitsandbytes 4-bit checkpoints"
    )


def _check_architecture(facts: dict[str, Any], where: Path) -> None:
    """A classifier or a bare encoder has a decoder's model_type at times: its `architectures` tell."""
    names = facts.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: architectures: expected a list of names, found {names!r:.60}")
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if names and not any(n in known or n.endswith(("ForCausalLM", "LMHeadModel")) for n in names):
        wanted = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[facts["model_type"]]
        raise UserError(f"{where}: architectures says {names[0]}, no causal language model (expected {wanted})")
    causal_by_choice = nearest(facts["model_type"], ("bert", "roberta", "xlm-roberta", "electra", "rembert"))
    if causal_by_choice == facts["model_type"] and not facts.get("is_decoder"):
        raise UserError(f"{where}: {facts['model_type']} without is_decoder is an encoder; ftrun tunes decoders")


def _short(error: BaseException) -> str:
    if isinstance(error, ZeroDivisionError):
        return "a size in it is 0, such as num_attention_heads; expected 1 or more"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__
