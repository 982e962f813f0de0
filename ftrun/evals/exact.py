"""Exact match: what the model writes after a row's prompt holds the same answer as the row does.

What counts as the answer is taken out of both texts by one extractor: the last number, the first JSON value, or a
regular expression's group.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

EXTRACTORS = ("number", "json", "regex")
# a sign is one where nothing that it could be taken from stands before it: 5-7 ends with 7
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])[-−](?=[$€£]?[.\d]))?[$€£]?(?:(?<=[$€£])[-−])?(?<!\w)"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][+-]?\d+)?"
)
_ENOUGH = 0.9  # of the references that an extractor must find an answer in to be chosen unasked


@dataclass(frozen=True)
class Question:
    """prompt: token ids up to the row's last learnt passage, which is `reference`, as text."""

    prompt: list[int]
    reference: str


@dataclass(frozen=True)
class Exact:
    """kind: one of EXTRACTORS; pattern: of "regex"."""

    kind: str
    pattern: str | None = None

    def answer(self, text: str) -> Any:
        """The answer that a text holds; None where it holds none."""
        if self.kind == "number":
            return last_number(text)
        if self.kind == "json":
            return first_json(text)
        found = re.search(self.pattern or "", text, re.MULTILINE)
        if found is None:
            return None
        return (found.group(1) if found.re.groups else found.group(0)) or ""

    def same(self, text: str, reference: str) -> bool:
        """Whether both hold one answer."""
        found, wanted = self.answer(text), self.answer(reference)
        return found is not None and wanted is not None and equal(found, wanted)


def last_number(text: str) -> Decimal | None:
    """The last number of a text: 1,234 and $5 and 20% and −3.50 are numbers, the dot that ends a sentence is none."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    plain = re.sub(r"[\s,$€£]", "", found[-1]).replace("−", "-")
    try:
        return Decimal(plain)
    except InvalidOperation:
        return None


def first_json(text: str) -> Any:
    """The first JSON object or list that a text holds, whatever stands around it; None where there is none."""
    decoder = json.JSONDecoder(parse_float=Decimal, parse_int=Decimal)
    for place in (m.start() for m in re.finditer(r"[{\[]", text)):
        try:
            return decoder.raw_decode(text, place)[0]
        except ValueError:
            continue
        except RecursionError:
            return None
    return None


def equal(one: Any, other: Any) -> bool:
    """Equality of JSON values: numbers by value, objects in any order of their keys; true is no 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return type(one) is type(other) and bool(one == other)


def question(ids: Sequence[int], learn: Sequence[int], tokenizer: Any) -> Question | None:
    """A row as a question; None where nothing stands before what is learnt. ids, learn: without virtual tokens."""
    last = max((i for i, one in enumerate(learn) if one), default=-1)
    first = last
    while first > 0 and learn[first - 1]:
        first -= 1
    if first < 1:
        return None
    reference = tokenizer.decode(list(ids[first : last + 1]), skip_special_tokens=True)
    return Question([int(i) for i in ids[:first]], str(reference).strip())


def chosen(questions: Sequence[Question]) -> Exact | None:
    """The extractor that finds an answer in nearly all references, JSON before numbers; None where none does."""
    for kind in ("json", "number"):
        one = Exact(kind)
        if questions and sum(one.answer(q.reference) is not None for q in questions) >= _ENOUGH * len(questions):
            return one
    return None


def measure(
    exact: Exact,
    questions: Sequence[Question],
    generate: Callable[[list[list[int]]], list[str]],
    prefix: Sequence[int] = (),
    rows_at_once: int = 16,
) -> dict[str, Any]:
    """{rows, matched, share, answered: texts that held an answer at all, texts: the first three}.

    generate: prompts -> what the model writes after each. Prompts of like length go together; prefix: virtual tokens
    in front of each.
    """
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].prompt))
    texts = [""] * len(questions)
    for start in range(0, len(order), rows_at_once):
        places = order[start : start + rows_at_once]
        written = generate([[*prefix, *questions[i].prompt] for i in places])
        for place, text in zip(places, written, strict=True):
            texts[place] = text
    matched = [exact.same(text, q.reference) for text, q in zip(texts, questions, strict=True)]
    return {
        "rows": len(questions),
        "matched": sum(matched),
        "share": sum(matched) / max(len(questions), 1),
        "answered": sum(exact.answer(text) is not None for text in texts),
        "texts": texts[:3],
    }
