"""What a row means: its shape, recognised by its columns, as a conversation or as plain text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ftrun.data.options import DataOptions
from ftrun.data.record import CONTINUES, ColumnsError, RowError
from ftrun.errors import nearest

Message = dict[str, Any]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation. learn: whether each message is learnt; everything: so is all between the messages."""

    messages: list[Message]
    learn: list[bool]
    tools: list[dict[str, Any]] | None = None
    everything: bool = False


@dataclass(frozen=True)
class Text:
    """Plain text, learnt whole. continues: the document goes on in the next row."""

    text: str
    continues: bool = False


_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
_FLAGS = ("train", "training", "learn", "weight")
_KEPT = ("tool_calls", "reasoning_content", "name", "tool_call_id", "thinking")
_EXPECTED = (
    "messages | conversations | prompt, completion | instruction, (input,) output | question, answer | text. "
    "Map your columns: data.columns={prompt: YOURS, completion: YOURS}"
)


def read(record: Record, options: DataOptions) -> Chat | Text:
    """A record as a conversation or text. Raises RowError: what was found, what was expected."""
    row = _mapped(record, options.columns) if options.columns else record
    for names, shape in _SHAPES:
        if all(_column(row, name) for name in names):
            return shape(row, options)
    raise ColumnsError(f"found the columns {_listed(record)}, expected {_half(row)}{_EXPECTED}")


def _half(row: Record) -> str:
    """What a row lacks that has one column of a shape of two."""
    for names, _ in _SHAPES:
        have = [name for name in names if _column(row, name)]
        if have and len(have) < len(names):
            (lacking,) = [name for name in names if name not in have]
            return f"{' or '.join(lacking)} beside {_column(row, have[0])[0]}. Rows hold "  # type: ignore[index]
    return ""


def _mapped(record: Record, columns: Mapping[str, str]) -> dict[str, Any]:
    for ours, theirs in columns.items():
        if theirs not in record:
            close = nearest(theirs, map(str, record))
            hint = f". Did you mean {close!r}?" if close else ""
            raise ColumnsError(f"data.columns: {ours}: found no column {theirs!r} among {_listed(record)}{hint}")
    taken = set(columns.values())
    return {**{k: v for k, v in record.items() if k not in taken}, **{o: record[t] for o, t in columns.items()}}


def _listed(record: Record) -> str:
    names = [str(name)[:80] for name in itertools.islice(record, 12)]
    more = f", … ({len(record):,} in all)" if len(record) > len(names) else ""
    return ", ".join(names) + more if names else "none"


def _column(row: Record, names: tuple[str, ...]) -> tuple[str, Any] | None:
    """The first of a column's names that the row has, and what stands there."""
    for name in names:
        found = row.get(name)
        if found is not None:
            return name, found
    return None


def _texts(row: Record, names: tuple[str, ...]) -> str:
    """A column's text, "" where the row has none."""
    found = _column(row, names)
    return text(found[1], found[0]) if found else ""


def _messages(row: Record, options: DataOptions) -> Chat:
    key, found = _column(row, _MESSAGES) or ("messages", None)
    messages, flags = _turns(found, key)
    return _chat(row, messages, flags, options)


def _prompt_completion(row: Record, options: DataOptions) -> Chat:
    before, flags = _said(row, ("prompt",), "user")
    after, more = _said(row, _COMPLETION, "assistant")
    return _chat(row, before + after, flags + more, options, first=len(before))


def _said(row: Record, names: tuple[str, ...], role: str) -> tuple[list[Message], list[bool | None]]:
    key, found = _column(row, names) or (names[0], None)
    if isinstance(found, str):
        return [{"role": role, "content": text(found, key)}], [None]
    if not isinstance(found, list | tuple):
        raise RowError(f"{key}: found {_shown(found)}, expected text, or a list of messages {{role, content}}")
    return _turns(found, key)


def _instruction(row: Record, options: DataOptions) -> Chat:
    # without an instruction, the input alone is what is asked
    asked = [_texts(row, ("instruction",)), _texts(row, _INPUT)]
    return _asked(row, "\n\n".join(part for part in asked if part), _texts(row, _OUTPUT), options)


def _question(row: Record, options: DataOptions) -> Chat:
    return _asked(row, _texts(row, ("question",)), _texts(row, _ANSWER), options)


def _asked(row: Record, question: str, answer: str, options: DataOptions) -> Chat:
    messages: list[Message] = []
    for i, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"history[{i}]: found {_kind(pair)}, expected a list [question, answer]")
        messages.append({"role": "user", "content": text(pair[0], f"history[{i}]")})
        messages.append({"role": "assistant", "content": text(pair[1], f"history[{i}]")})
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _chat(row, messages, [None] * len(messages), options)


def _text(row: Record, options: DataOptions) -> Text:
    return Text(text(row["text"], "text"), bool(row.get(CONTINUES)))


_MESSAGES = ("messages", "conversations")
_COMPLETION = ("completion", "response")
_INPUT = ("input", "context")
_OUTPUT = ("output", "response")
_ANSWER = ("answer", "response")
# in this order: the first shape whose columns a row has
_SHAPES: tuple[tuple[tuple[tuple[str, ...], ...], Callable[[Record, DataOptions], Chat | Text]], ...] = (
    ((_MESSAGES,), _messages),
    ((("prompt",), _COMPLETION), _prompt_completion),
    ((("instruction",), _OUTPUT), _instruction),
    ((("question",), _ANSWER), _question),
    ((("input",), ("output",)), _instruction),
    ((("text",),), _text),
)


def _chat(row: Record, messages: list[Message], flags: list[bool | None], options: DataOptions, first: int = 0) -> Chat:
    """The conversation with its system prompt, and what of it is learnt: from message `first` on, flags first."""
    if not messages:
        raise RowError("found no messages, expected one of the assistant at least")
    brought = text(row["system"], "system") if row.get("system") else options.system
    if brought and messages[0]["role"] != "system":
        messages, flags, first = [{"role": "system", "content": brought}, *messages], [None, *flags], first + 1
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
    if options.loss_on == "completion" and first <= 1:
        turns = turns[-1:]
    everything = options.loss_on == "all"
    learn = [
        flag if flag is not None else (everything or i in turns) and not _silent(messages[i])
        for i, flag in enumerate(flags)
    ]
    return Chat(messages, learn, _tools(row.get("tools")), everything)


def _silent(message: Message) -> bool:
    return message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls")


def _turns(found: Any, key: str) -> tuple[list[Message], list[bool | None]]:
    if isinstance(found, str):
        found = _parse(found, key)
    if not isinstance(found, list | tuple):
        raise RowError(f"{key}: found {_kind(found)}, expected a list of messages {{role, content}}")
    messages, flags = [], []
    for i, turn in enumerate(found):
        where = f"{key}[{i}]"
        if not isinstance(turn, Mapping):
            raise RowError(f"{where}: found {_kind(turn)}, expected a message {{role, content}}")
        messages.append(_message(turn, where))
        flags.append(_flag(turn, where))
    return messages, flags


def _message(turn: Record, where: str) -> Message:
    said = turn.get("role", turn.get("from"))
    role = _ROLES.get(str(said).lower()) if said is not None else None
    if role is None:
        found = "no role" if said is None else f"the role {said!r}"
        close = nearest(str(said), _ROLES) if said is not None else None
        hint = f". Did you mean {close!r}?" if close else ""
        raise RowError(f"{where}: found {found}, expected system, user, assistant or tool (human, gpt){hint}")
    content = turn.get("content", turn.get("value"))
    kept = {k: turn[k] for k in _KEPT if turn.get(k)}
    if role == "function_call":
        call = _parse(text(content, where), where)
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    if content is None and not kept.get("tool_calls"):
        raise RowError(f"{where}: found no content, expected text")
    return {"role": role, "content": _content(content, where), **_whole(kept, where)}


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if not isinstance(content, list | tuple):
        return text(content, f"{where}.content")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
        if kind != "text":
            raise RowError(f"{where}.content: found a part of the kind {kind}, expected text alone")
        parts.append(text(part.get("text"), f"{where}.content"))
    return "".join(parts)


def _whole(kept: dict[str, Any], where: str) -> dict[str, Any]:
    """Tool calls and reasoning as templates take them: arguments as mappings, without the nulls of Arrow's structs."""
    for call in kept.get("tool_calls", ()):
        if not isinstance(call, Mapping):
            raise RowError(f"{where}.tool_calls: found {_kind(call)}, expected {{function: {{name, arguments}}}}")
    if "tool_calls" in kept:
        kept["tool_calls"] = [_call(_full(call)) for call in kept["tool_calls"]]
    return kept


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            return call
    return call


def _full(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _full(v) for k, v in value.items() if v is not None}
    return [_full(v) for v in value] if isinstance(value, list | tuple) else value


def _flag(turn: Record, where: str) -> bool | None:
    for key in _FLAGS:
        found = turn.get(key)
        if found is None:
            continue
        if found not in (0, 1):
            raise RowError(f"{where}.{key}: found {found!r}, expected 0 or 1 (false or true): a turn is learnt or not")
        return bool(found)
    return None


def _tools(found: Any) -> list[dict[str, Any]] | None:
    tools = _parse(found, "tools") if isinstance(found, str) and found.strip() else found
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(f"tools: found {_kind(tools)}, expected a list of functions with their JSON schemas")
    return [_full(tool) for tool in tools]


def _parse(found: str, key: str) -> Any:
    try:
        return json.loads(found)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{key}: found text that is no JSON ({error}), expected a list or an object") from error


def text(found: Any, key: str) -> str:
    """`found` as text that a tokenizer takes. Raises RowError."""
    if not isinstance(found, str):
        raise RowError(f"{key}: found {_shown(found)}, expected text")
    if "\0" in found:
        raise RowError(f"{key}: found a NUL character at position {found.index(chr(0)) + 1}, expected text")
    if not found.isascii():
        try:
            found.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"{key}: found half a character at position {error.start + 1}, expected text") from error
    return found


def _shown(found: Any) -> str:
    try:
        return f"{_kind(found)} ({found})" if isinstance(found, int | float) else _kind(found)
    except ValueError:
        # Python writes no integer of over 4,300 digits
        return "a number of thousands of digits"


def _kind(found: Any) -> str:
    names = {bool: "true/false", int: "a number", float: "a number", str: "text", type(None): "null"}
    return names.get(type(found), "a list" if isinstance(found, list | tuple) else "an object")
