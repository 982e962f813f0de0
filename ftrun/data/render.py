"""Conversations rendered by the chat template, with the learnt stretches known by position.

Where a message's text lies in the rendered one is found by rendering a skeleton once: the same roles, with one private
character in place of each content. What the template puts between is the same for every conversation of these roles,
and the row's own rendering proves it. Rows with more than plain contents (tool calls, reasoning) and templates that
look into contents are rendered step by step instead: up to the message, and with it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ftrun.data.record import RowError
from ftrun.data.shapes import Chat, Message

_GUARDS = range(0xF0000, 0xFFFFE)
_SLOTS = 0x100000
# what a template's own expressions raise, beside Jinja's errors: 1/0, range(10**9), messages[5].x
_REFUSALS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. spans: the learnt [start, end) in characters, apart and in order; an answer's includes
    its EOS. guards: characters of `text` that stand for a control token's name that a content spelt out.
    """

    text: str
    spans: list[tuple[int, int]]
    guards: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a message stands in the text. closed: a control token ends it, and is inside."""

    start: int
    end: int
    closed: bool


class Rewrites(RowError):
    """The template shows an earlier turn otherwise once a later one follows."""


class Renderer:
    """Renders conversations with a tokenizer's chat template.

    folded: how many system prompts went into the first question, as the template knows no system role. unseen: how
    many conversations brought tools that the template does not show.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos: str = tokenizer.eos_token
        names = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | {self.eos}
        self.controls = re.compile("|".join(re.escape(n) for n in sorted(names, key=len, reverse=True)))
        self._controls = re.compile(f"(?:{self.controls.pattern})+")
        self._ending = re.compile(f"(?:{self.controls.pattern})+(?=\\s*$)")
        self.folded = self.unseen = 0
        self.skeletons: dict[str, list[str] | None] = {}

    def render(self, chat: Chat) -> list[Rendered]:
        """The conversation as one row; as one row a learnt turn where the template rewrites earlier turns.

        Raises RowError where the template refuses it.
        """
        chat, guards = self._guarded(self._unended(_trimmed(chat)))
        if not any(chat.learn):
            return []
        self._check_calls(chat)
        self.unseen += bool(chat.tools) and not self._shows_tools
        try:
            return [dataclasses.replace(self._one(chat), guards=guards)]
        except Rewrites:
            if chat.everything:
                raise
        turns = [i for i, learnt in enumerate(chat.learn) if learnt]
        rows = [_upto(chat, turn) for turn in turns]
        return [dataclasses.replace(self._one(row), guards=guards) for row in rows]

    def _check_calls(self, chat: Chat) -> None:
        """Raises RowError where the template passes over the calls of tools: an empty answer would be learnt."""
        calling = [i for i, m in enumerate(chat.messages) if m.get("tool_calls")]
        if not calling:
            return
        without = [{k: v for k, v in m.items() if k != "tool_calls"} for m in chat.messages]
        try:
            same = self._apply(chat.messages, chat.tools) == self._apply(without, chat.tools)
        except RowError:
            return
        if same:
            raise RowError(
                f"messages[{calling[0]}]: found tool_calls, which the chat template does not show; expected a template "
                "that knows tools (data.template=FILE.jinja)"
            )

    @functools.cached_property
    def _shows_tools(self) -> bool:
        asked = [{"role": "user", "content": chr(_SLOTS)}]
        tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
        try:
            return self._apply(asked, [tool]) != self._apply(asked, None)
        except RowError:
            return True

    def _one(self, chat: Chat) -> Rendered:
        try:
            text = self._apply(chat.messages, chat.tools)
        except RowError:
            folded = _fold(chat)
            if folded is None:
                raise
            chat, text = folded, self._apply(folded.messages, folded.tools)
            self.folded += 1
        last = len(chat.messages) - 1
        speakers = {i for i, m in enumerate(chat.messages) if m["role"] == "assistant"}
        wanted = {i for i, learnt in enumerate(chat.learn) if learnt != chat.everything}
        places = self._by_skeleton(chat, text, {*wanted, *speakers, last})
        if places is None:
            places = self._by_steps(chat, text, {*wanted, last})
        learnt = {i for i in speakers & places.keys() if chat.learn[i]}
        return self._ended(text, places, sorted(wanted), learnt, chat.everything)

    def _ended(
        self, text: str, places: dict[int, Place], wanted: list[int], answers: set[int], everything: bool
    ) -> Rendered:
        """Cuts after the last turn's end, and puts EOS where a learnt answer (or the row) ends without one."""
        end = places[max(places)].end
        without = {places[i].end for i in answers if not places[i].closed}
        if not text[:end].endswith(self.eos):
            without.add(end)
        cuts = sorted(without)
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, end], strict=True)]
        whole = self.eos.join(pieces)

        def moved(position: int) -> int:
            return position + len(self.eos) * sum(cut <= position for cut in cuts)

        spans = [(moved(places[i].start), moved(places[i].end)) for i in wanted]
        return Rendered(whole, _complement(spans, len(whole)) if everything else spans)

    def _by_skeleton(self, chat: Chat, text: str, wanted: set[int]) -> dict[int, Place] | None:
        """Where the wanted messages stand in `text`, or None where the skeleton does not fit."""
        if any(set(m) - {"role", "content"} for m in chat.messages):
            return None
        frames = self._skeleton([m["role"] for m in chat.messages], chat.tools)
        contents = _placed(text, frames, [m["content"] for m in chat.messages]) if frames else None
        if contents is None or frames is None:
            return None
        speakers = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
        upto = chat.messages[: (speakers[-1] if speakers else len(frames) - 2) + 1]
        closing = self._skeleton([m["role"] for m in upto], chat.tools) or frames
        found = {}
        for i in wanted:
            start, end = contents[i]
            assistant = chat.messages[i]["role"] == "assistant"
            head = frames[i].rfind(self._opening) if assistant and self._opening else -1
            if head >= 0:
                start -= len(frames[i]) - head - len(self._opening)
            last = i == len(chat.messages) - 1
            tail = frames[i + 1] if last else _shared(frames[i + 1], closing[-1])
            control = self._controls.search(tail)
            if control is None and assistant and not last:
                control = self._turn_end(_shared(frames[i + 1], frames[i]))
            found[i] = Place(start, end + control.end() if control else end, control is not None)
        return found

    def _turn_end(self, both: str) -> re.Match[str] | None:
        """The control token that ends any turn (gpt-oss: <|end|>, and <|return|> the last alone), out of what follows
        one turn and another; None where it opens the next turn.
        """
        control = self.controls.match(both)
        return control if control and not self._opening.startswith(control[0]) else None

    def _skeleton(self, roles: list[str], tools: list[dict[str, Any]] | None) -> list[str] | None:
        """What the template puts before, between and after the contents of these roles."""
        key = json.dumps([roles, tools], default=str)
        if key not in self.skeletons:
            if len(self.skeletons) > 4096:
                self.skeletons.clear()
            slots = [chr(_SLOTS + i) for i in range(len(roles))]
            messages = [{"role": role, "content": slot} for role, slot in zip(roles, slots, strict=True)]
            try:
                text = self._apply(messages, tools)
            except RowError:
                text = ""
            frames = re.split("|".join(slots), text) if all(text.count(slot) == 1 for slot in slots) else None
            self.skeletons[key] = frames if frames and "".join(_woven(frames, slots)) == text else None
        return self.skeletons[key]

    @functools.cached_property
    def _opening(self) -> str:
        """The text that asks the assistant to speak, "" where the template has none."""
        asked = [{"role": "user", "content": chr(_SLOTS)}]
        try:
            before, after = self._apply(asked, None), self._apply(asked, None, opening=True)
        except RowError:
            return ""
        return after.removeprefix(before) if after.startswith(before) else ""

    def _by_steps(self, chat: Chat, text: str, wanted: set[int]) -> dict[int, Place]:
        """The same, by rendering up to each message and with it. Raises Rewrites where a rendering is no prefix."""
        found = {}
        for i in sorted(wanted):
            whole = self._apply(chat.messages[: i + 1], chat.tools)
            if not text.startswith(whole):
                raise Rewrites(
                    "the chat template rewrites earlier turns, so they cannot be learnt where they stand; "
                    "expected data.loss_on=assistant or completion, or another data.template"
                )
            start = len(_shared(self._before(chat, i), whole))
            control = self._ending.search(whole, start)
            found[i] = Place(start, control.end() if control else len(whole.rstrip()), control is not None)
        return found

    def _before(self, chat: Chat, message: int) -> str:
        speaks = chat.messages[message]["role"] == "assistant"
        try:
            return self._apply(chat.messages[:message], chat.tools, opening=speaks)
        except RowError:
            # a template may not stand the beginning of the conversation alone
            if message == 0:
                return ""
            raise

    def _apply(self, messages: list[Message], tools: list[dict[str, Any]] | None, opening: bool = False) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=opening
            )
        except (jinja2.TemplateError, *_REFUSALS) as error:
            why = str(error).rstrip(".") or type(error).__name__
            raise RowError(f"the chat template refuses the conversation: {why}") from error

    def _unended(self, chat: Chat) -> Chat:
        """Without the EOS that some data spell out at an answer's end: the row gets one anyway."""
        if not any(m["content"].endswith(self.eos) for m in chat.messages):
            return chat
        messages = [
            {**m, "content": m["content"].removesuffix(self.eos)} if m["role"] == "assistant" else m
            for m in chat.messages
        ]
        return dataclasses.replace(chat, messages=messages)

    def _guarded(self, chat: Chat) -> tuple[Chat, dict[str, str]]:
        """Control tokens' names in the contents, each replaced by a private character, so that they stay text."""
        spoken = [*chat.messages, *(chat.tools or ())]
        found = {name for m in spoken for t in _texts(m) for name in self.controls.findall(t)}
        if not found:
            return chat, {}
        used = set("".join(t for m in spoken for t in _texts(m)))
        free = (chr(code) for code in _GUARDS if chr(code) not in used)
        marks = {name: next(free) for name in sorted(found)}

        def guarded(value: Any) -> Any:
            return _map(value, lambda text: self.controls.sub(lambda name: marks[name[0]], text))

        messages, tools = guarded(chat.messages), guarded(chat.tools) if chat.tools else None
        return dataclasses.replace(chat, messages=messages, tools=tools), {mark: name for name, mark in marks.items()}


def _trimmed(chat: Chat) -> Chat:
    """Without the messages after the last learnt one: nothing is learnt from them."""
    if chat.everything or not any(chat.learn):
        return chat
    return _upto(chat, max(i for i, learnt in enumerate(chat.learn) if learnt), alone=False)


def _upto(chat: Chat, message: int, alone: bool = True) -> Chat:
    learn = [(not alone and learnt) or i == message for i, learnt in enumerate(chat.learn[: message + 1])]
    return dataclasses.replace(chat, messages=chat.messages[: message + 1], learn=learn)


def _fold(chat: Chat) -> Chat | None:
    """The system prompt put before the first question, for templates that know no system role (Gemma)."""
    if [m["role"] for m in chat.messages[:2]] != ["system", "user"]:
        return None
    system, question = chat.messages[:2]
    joined = {**question, "content": f"{system['content']}\n\n{question['content']}"}
    return dataclasses.replace(chat, messages=[joined, *chat.messages[2:]], learn=chat.learn[1:])


def _placed(text: str, frames: list[str], contents: list[str]) -> list[tuple[int, int]] | None:
    """[start, end) of each content in `text`, trimmed as the template trims; None where frames and text disagree."""
    if not text.startswith(frames[0]):
        return None
    position, places = len(frames[0]), []
    for i, content in enumerate(contents):
        rest = text if i == len(contents) - 1 else None
        for form in (content, content.strip(), content.rstrip(), content.lstrip()):
            following = form + frames[i + 1]
            if text.startswith(following, position) and (rest is None or position + len(following) == len(text)):
                places.append((position, position + len(form)))
                position += len(following)
                break
        else:
            return None
    return places


def _woven(frames: list[str], slots: list[str]) -> Iterator[str]:
    for frame, slot in zip(frames, [*slots, ""], strict=True):
        yield frame
        yield slot


def _shared(one: str, other: str) -> str:
    size = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:size]


def _complement(spans: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    edges = [0, *(edge for span in spans for edge in span), size]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key != "role":
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _map(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {k: v if k == "role" else _map(v, change) for k, v in value.items()}
    return [_map(v, change) for v in value] if isinstance(value, list) else value
