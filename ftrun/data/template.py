"""The chat template that a job trains with: the tokenizer's own, a plain one, or the user's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftrun.data.sources import template_file
from ftrun.errors import UserError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# contents one after another, a line end between two that have no space there; an answer ends with EOS
PLAIN = (
    "{% for message in messages %}{% set next = loop.nextitem.content if not loop.last else '' %}"
    "{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}"
    "{% elif message.content and message.content[-1:].strip() and (loop.last and add_generation_prompt"
    " or not loop.last and next[:1].strip()) %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)
_BUILT_IN = {"chatml": CHATML, "plain": PLAIN}


def adopt(tokenizer: Any, template: str | None, say: Callable[[str], None]) -> str:
    """Sets the tokenizer's chat template to the job's, so that training, answers and the saved adapter agree.

    template: null keeps the tokenizer's own (plain where it has none), chatml, plain, or a .jinja file. Returns
    the template's name for people. Raises UserError on a missing or broken file, and on a tokenizer without EOS.
    """
    if tokenizer.eos_token is None or tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, expected one: nothing else would teach the model to stop")
    if template is None:
        if tokenizer.chat_template:
            return "the tokenizer's own"
        say("data: the tokenizer has no chat template; rows are trained as plain text (data.template=plain)")
        template = "plain"
    source = _BUILT_IN.get(template) or _read(template_file(template))
    if template in _BUILT_IN and adds_bos(tokenizer):
        source = "{{ bos_token }}" + source
    if template == "chatml" and "<|im_end|>" not in tokenizer.get_vocab():
        say("data.template=chatml: the tokenizer has no token <|im_end|>; it is written as text, and EOS ends a turn")
    tokenizer.chat_template = source
    return template


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.template={path}: expected a chat template in Jinja, UTF-8 text; found: {error}"
        ) from error


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer starts a text with BOS by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a").input_ids)[:1] == [bos]
