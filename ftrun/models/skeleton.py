"""The model without its weights: built on the meta device, so that a 70B one takes no memory and a few seconds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig

from ftrun.errors import UserError
from ftrun.models.base import Base
from ftrun.models.experts import GROUPED, register_experts
from ftrun.models.forward import PLAIN

# what transformers' configs call their dropouts; routers' jitter is noise of the same kind
_NOISE = ("dropout", "pdrop", "layerdrop", "jitter_noise")


def skeleton(base: Base, attention: str = "sdpa") -> nn.Module:
    """The causal language model of `base` on the meta device, in its dtype, in eval mode, without a cache.

    attention: a name that transformers' AttentionInterface knows; for a family that has no "sdpa" (Gemma 2, for its
    capped scores) that one and PLAIN mean "eager". Embedding and head have `base.rows` rows.
    The base's own dropout is off, in training too: GPT-2 and OPT say 0.1 for their pretraining, a tuned base is
    frozen or nearly so, and the method's `dropout` is the one knob. Experts run by our grouped product.
    `base.config` stays as it is: save that one.
    Raises UserError where the model's code cannot do with `attention`, or cannot be built.
    """
    config = _prepared(base.config, base.rows)
    options: dict[str, Any] = {"dtype": base.dtype, "attn_implementation": _known(config, attention)}
    if base.options.trust_remote_code:
        options["trust_remote_code"] = True
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options)
        if any("experts" in name and p.dim() == 3 for name, p in model.named_parameters()):
            register_experts()
            model.set_experts_implementation(GROUPED)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise UserError(f"model={base.name}: {config.model_type} cannot be built: {error}") from error
    return model.eval()


def _known(config: PretrainedConfig, attention: str) -> str:
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    lacking = attention in ("sdpa", PLAIN) and family is not None and not getattr(family, "_supports_sdpa", True)
    return "eager" if lacking else attention


def _prepared(config: PretrainedConfig, rows: int) -> PretrainedConfig:
    """A copy without cache, dropout and quantisation, for `rows` tokens."""
    config = copy.deepcopy(config)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key in list(vars(part)):
            if key.endswith(_NOISE) and isinstance(getattr(part, key), int | float):
                setattr(part, key, 0.0)
        part.use_cache = False
    config.get_text_config().vocab_size = rows
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
