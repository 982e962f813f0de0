"""The model without its weights: built on the meta device, so that a 70B one takes no memory and a few seconds."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig

from ftrun.errors import UserError
from ftrun.models.base import Base
from ftrun.models.experts import GROUPED, register_experts
from ftrun.models.forward import PACKED, known
from ftrun.models.packing import check_packing, refusal

# what transformers' configs call their dropouts; routers' jitter is noise of the same kind
_NOISE = ("dropout", "pdrop", "layerdrop", "jitter_noise")
# a table of positions, learnt or computed once: it ends, where rotary angles go on
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions?|positions?_embed(dings?)?|pos_emb(ed)?s?)(\.weight)?$")
# what transformers' code raises on facts it cannot do with: a family's constructor checks few of them itself
_WRONG = (
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)


def skeleton(base: Base, attention: str = "sdpa") -> nn.Module:
    """The causal language model of `base` on the meta device, in its dtype, in eval mode, without a cache.

    attention: a name that transformers' AttentionInterface knows; for a family that has no "sdpa" (Gemma 2, for its
    capped scores) that one and PLAIN mean "eager". Embedding and head have `base.rows` rows.
    The base's own dropout is off, in training too: GPT-2 and OPT say 0.1 for their pretraining, a tuned base is
    frozen or nearly so, and the method's `dropout` is the one knob. Experts run by our grouped product.
    `base.config` stays as it is: save that one.
    Raises UserError where the model's code cannot do with `attention` (with ours: cannot keep packed rows apart), or
    cannot be built.
    """
    config = _prepared(base.config, base.rows)
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    options: dict[str, Any] = {"dtype": base.dtype, "attn_implementation": known(family, attention)}
    if base.options.trust_remote_code:
        options["trust_remote_code"] = True
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options)
        if any("experts" in name and p.dim() == 3 for name, p in model.named_parameters()):
            register_experts()
            model.set_experts_implementation(GROUPED)
    except _WRONG as error:
        if PACKED in str(error):
            raise refusal(config, "its attention is code of its own") from error
        raise UserError(f"{_where(base)}: {config.model_type} cannot be built: {_why(config, error)}") from error
    if getattr(model, "_is_stateful", False):
        raise UserError(
            f"{_where(base)}: {config.model_type} is recurrent; ftrun tunes models whose tokens meet in attention alone"
        )
    if attention == PACKED:
        check_packing(model)
    # read where rows and answers are made: beyond it there is no embedding to look up
    model.table_of_positions = _table(model)
    return model.eval()


def check_length(model: Any, seq_len: int, say: Callable[[str], None]) -> None:
    """Raises UserError where rows of seq_len outrun the model's table of positions; says so where they merely outrun
    what it was trained for.
    """
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if model.table_of_positions is not None and seq_len > model.table_of_positions:
        most = model.table_of_positions
        raise UserError(
            f"seq_len={seq_len}: the model has {most} positions, virtual tokens counted. Say seq_len={most}"
        )
    if isinstance(trained, int) and seq_len > trained:
        say(f"warning: seq_len={seq_len}: the model was made for {trained} positions; longer rows may train poorly")


def _table(model: Any) -> int | None:
    """How many positions the model has a table for; None where it counts on without one."""
    size = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    names = (name for name, _ in (*model.named_parameters(), *model.named_buffers()))
    return size if isinstance(size, int) and any(_POSITIONS.search(name) for name in names) else None


def _where(base: Base) -> str:
    return str(base.folder / "config.json") if base.folder is not None else f"model={base.name}"


def _why(config: PretrainedConfig, error: BaseException) -> str:
    """What transformers says, or the fact that it most likely stumbled over."""
    facts = {k: v for k, v in _facts(config.to_dict()) if v is not None}
    if isinstance(error, KeyError):
        named = [f"{k}={v}" for k, v in facts.items() if v == error.args[0]]
        return f"{named[0] if named else error.args[0]!r} is unknown to transformers"
    if isinstance(error, ZeroDivisionError):
        zeros = [f"{k}={v}" for k, v in facts.items() if v == 0 and k.startswith(("num_", "n_", "hidden_size"))]
        return f"a size is 0: {', '.join(zeros) or error}"
    return str(error) or type(error).__name__


def _facts(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in found.items():
        if isinstance(value, dict):
            yield from _facts(value)
        else:
            yield key, value


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
