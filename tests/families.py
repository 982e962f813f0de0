"""Tiny random models of every family, for tests: a config, a model in memory, or a folder as the hub has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.configuration_utils import PreTrainedConfig

VOCAB = 272
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")  # ids 0 to 4
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "tie_word_embeddings": False,
}
_GEMMA = {**_LLAMA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "tie_word_embeddings": True}
_MOE = {"num_experts_per_tok": 2}

# family (the transformers model_type) -> what its tiny config says
FACTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": None},
    "qwen2": {**_LLAMA, "tie_word_embeddings": True},
    "qwen3": {**_LLAMA, "head_dim": 32},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _LLAMA,
    "phi": _LLAMA,
    "smollm3": {**_LLAMA, "tie_word_embeddings": True},
    "olmo2": _LLAMA,
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 4,
    },
    "gpt_neox": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
        "init_std": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 4,
    },
    "mixtral": {**_LLAMA, **_MOE, "num_local_experts": 4},
    "qwen3_moe": {**_LLAMA, **_MOE, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
}
FAMILIES = tuple(FACTS)


def tiny(family: str, layers: int = 2, **changes: Any) -> PreTrainedConfig:
    """A config of the family: vocabulary 272, width 64, `layers` layers; `changes` override its fields."""
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return AutoConfig.for_model(family, **{**FACTS[family], depth: layers, **changes})


def tiny_model(family: str, layers: int = 2, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model in eval mode, the same at each call; biases and norms are not at their start values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny(family, layers, **changes), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith("embed_tokens.weight"):
                parameter.data[0] = 0.05 * torch.randn(parameter.shape[1])
    return model.eval()


def tiny_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 261 tokens with ChatML's tokens; it can write any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["</s>", "<|im_start|>"],
        model_max_length=256,
    )
    tokenizer.chat_template = template
    return tokenizer


def save_tiny(
    family: str, folder: Path, layers: int = 2, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any
) -> Path:
    """A folder with config.json, safetensors weights (in shards of `shard` bytes) and a tokenizer; returns it."""
    tiny_model(family, layers, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json; None takes a key out."""
    path = folder / "config.json"
    facts = json.loads(path.read_text())
    facts.update(changes)
    path.write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))
