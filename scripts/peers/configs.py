"""The architectures of the published rows, as their config.json files on the Hugging Face hub have them."""

from __future__ import annotations

from typing import Any

LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}


def _of(
    base: dict[str, Any], vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any
) -> Any:
    return {
        **base,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 8192,
        **more,
    }


MISTRAL = {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": None}
QWEN = {"model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": False}
TIED = {**LLAMA, "tie_word_embeddings": True}

CONFIGS: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": _of(MISTRAL, 32000, 4096, 14336, 32, 32, 8),
    "mistralai/Mistral-7B-Instruct-v0.3": _of(MISTRAL, 32768, 4096, 14336, 32, 32, 8),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _of(
        {**MISTRAL, "model_type": "mixtral"}, 32000, 4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2
    ),
    "NousResearch/Llama-2-70b-hf": _of(LLAMA, 32000, 8192, 28672, 80, 64, 8),
    "meta-llama/Meta-Llama-3-8B": _of(LLAMA, 128256, 4096, 14336, 32, 32, 8),
    "meta-llama/Llama-3.2-1B-Instruct": _of(TIED, 128256, 2048, 8192, 16, 32, 8, head_dim=64),
    "meta-llama/Llama-3.2-3B-Instruct": _of(TIED, 128256, 3072, 8192, 28, 24, 8, head_dim=128),
    "meta-llama/Llama-3.2-3B": _of(TIED, 128256, 3072, 8192, 28, 24, 8, head_dim=128),
    "Qwen/Qwen2.5-0.5B": _of(QWEN, 151936, 896, 4864, 24, 14, 2),
    "Qwen/Qwen2.5-1.5B-Instruct": _of(QWEN, 151936, 1536, 8960, 28, 12, 2),
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": _of(QWEN, 151936, 1536, 8960, 28, 12, 2),
    "Qwen/Qwen2.5-7B-Instruct": _of({**QWEN, "tie_word_embeddings": False}, 152064, 3584, 18944, 28, 28, 4),
    "HuggingFaceTB/SmolLM2-135M": _of(TIED, 49152, 576, 1536, 30, 9, 3),
    "HuggingFaceTB/SmolLM2-360M": _of(TIED, 49152, 960, 2560, 32, 15, 5),
    "HuggingFaceTB/SmolLM2-1.7B": _of(TIED, 49152, 2048, 8192, 24, 32, 32),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _of(LLAMA, 32000, 2048, 5632, 22, 32, 4),
    "deepseek-ai/deepseek-coder-1.3b-instruct": _of(LLAMA, 32256, 2048, 5504, 24, 16, 16),
    "JackFram/llama-160m": _of(LLAMA, 32000, 768, 3072, 12, 12, 12),
    "ibm/PowerLM-3b": _of(
        {"model_type": "granite", "tie_word_embeddings": True}, 49152, 2304, 9216, 40, 36, 36, rms_norm_eps=1e-5
    ),
    "bigcode/gpt_bigcode-santacoder": {
        "model_type": "gpt_bigcode",
        "vocab_size": 49280,
        "n_embd": 2048,
        "n_layer": 24,
        "n_head": 16,
        "n_inner": 8192,
        "n_positions": 2048,
        "multi_query": True,
        "activation_function": "gelu_pytorch_tanh",
    },
    "google/gemma-2-2b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
    },
}
