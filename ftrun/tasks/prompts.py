"""What is asked: prompts from the command line, a file or a conversation, as the tokens that the model is to go on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftrun.data.lines import numbered
from ftrun.data.record import Bad
from ftrun.data.template import adopt
from ftrun.errors import UserError, nearest
from ftrun.job import Job

BASE = "base"  # the name of the untuned model among the adapters

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """messages: the conversation so far. where: for messages, "file:line". adapter: whose answer is wanted, None where
    nobody said. given: the whole line of a file, to be written beside the answer.
    """

    messages: list[Message]
    where: str = "prompt"
    adapter: str | None = None
    given: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str, adapter: str | None = None) -> Prompt:
        return cls([{"role": "user", "content": text}], adapter=adapter, given={"prompt": text})


class Frame:
    """From a prompt to its tokens, as a job's rows have them: chat template, system prompt. template: the job's."""

    def __init__(self, job: Job, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.system = getattr(job.data.options, "system", None)
        own = tokenizer.chat_template
        adopt(tokenizer, getattr(job.data.options, "template", None), lambda text: None)
        self.template, tokenizer.chat_template = tokenizer.chat_template, own

    def ids(self, prompt: Prompt, raw: bool) -> list[int]:
        """The prompt's tokens, without virtual ones; raw: of its text as it stands.

        Raises UserError where the template refuses the conversation.
        """
        if raw:
            text = "".join(str(m["content"]) for m in prompt.messages)
            return [int(i) for i in self.tokenizer(text).input_ids]
        messages = prompt.messages
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        text = self._framed(messages, prompt.where)
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False).input_ids]

    def _framed(self, messages: Sequence[Message], where: str) -> str:
        import jinja2

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, chat_template=self.template
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(f"{where}: the chat template refuses the conversation: {error}") from error


def read(path: Path, adapter: str | None) -> list[Prompt]:
    """The prompts of a file: of .jsonl (or .json) an object a line, of any other a prompt a line; empty lines are none.

    An object holds `prompt` (text) or `messages` ({role, content}), and may name its `adapter`; adapter: of those that
    name none. Raises UserError, naming file and line, on whatever is wrong, and where there is no prompt.
    """
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        close = nearest(path.name, beside)
        raise UserError(f"prompts={path}: no such file" + (f". Did you mean {path.parent / close}?" if close else ""))
    found, structured = [], ".json" in "".join(path.suffixes)
    for number, line in numbered(path):
        where = f"{path}:{number}"
        if isinstance(line, Bad):
            raise UserError(f"{where}: {line.why}")
        if line.strip():
            text = line.rstrip("\r\n")
            found.append(_row(text, where, adapter) if structured else _with(Prompt.of(text, adapter), where))
    if not found:
        raise UserError(f"prompts={path}: holds no prompt")
    return found


def encodable(text: str) -> bool:
    """Whether a file of UTF-8 can hold it: half a surrogate pair, as JSON may escape one, it cannot."""
    return text.encode("utf-8", "ignore").decode("utf-8") == text


def _with(prompt: Prompt, where: str) -> Prompt:
    return Prompt(prompt.messages, where, prompt.adapter, prompt.given)


def _row(text: str, where: str, adapter: str | None) -> Prompt:
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}. Expected one object a line") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: found {type(row).__name__}, expected an object with prompt or messages")
    own = row.get("adapter", adapter)
    if own is not None and not isinstance(own, str):
        raise UserError(f"{where}: adapter: found {own!r}, expected an adapter's name")
    messages: list[Message] = []
    if isinstance(row.get("messages"), list) and row["messages"]:
        messages = [_message(m, where) for m in row["messages"]]
    elif isinstance(row.get("prompt"), str) and row["prompt"]:
        messages = [{"role": "user", "content": row["prompt"]}]
    if messages:
        if not encodable("".join(str(m["content"]) for m in messages)):
            raise UserError(f"{where}: holds half a surrogate pair, which is no text")
        return Prompt(messages, where, own, row)
    raise UserError(f"{where}: found {', '.join(row) or 'nothing'}, expected prompt (text) or messages (a list)")


def _message(found: Any, where: str) -> Message:
    if not isinstance(found, dict) or not isinstance(found.get("role"), str) or "content" not in found:
        raise UserError(f"{where}: messages: found {str(found)[:80]}, expected {{role, content}}")
    return found
