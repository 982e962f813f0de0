"""From records to rows of token ids with what is learnt of each, in batches."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftrun.data.options import DataOptions
from ftrun.data.record import Bad, ColumnsError, Records, RowError
from ftrun.data.render import Rendered, Renderer
from ftrun.data.shapes import Chat, Text, read
from ftrun.data.template import adds_bos
from ftrun.errors import UserError

BATCH = 1000  # rows tokenised at once
BATCH_CHARACTERS = 4 << 20
NOTED = 20  # rows left out that are named


@dataclass(frozen=True)
class Row:
    """One row. ids: (tokens,) int32; learn: (tokens,) uint8, 1 where the token is learnt."""

    where: str
    ids: np.ndarray
    learn: np.ndarray


@dataclass
class Tally:
    """What became of the rows read. left_out names the first rows of each kind that were."""

    counts: Counter[str] = field(default_factory=Counter)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def leave(self, kind: str, where: str, why: str) -> None:
        """Counts a row that is left out."""
        self.counts[kind] += 1
        if self.counts[kind] <= NOTED:
            self.left_out.append({"where": where, "what": kind, "why": why})


class Encoder:
    """Encodes a source's records.

    room: tokens a row may have. prefixed: virtual tokens will stand before each row, so that its first token has
    one to be predicted from.
    """

    def __init__(self, tokenizer: Any, options: DataOptions, room: int, prefixed: bool, tally: Tally) -> None:
        self.tokenizer, self.options, self.room, self.prefixed = tokenizer, options, room, prefixed
        self.renderer = Renderer(tokenizer)
        self.tally = tally
        self.bos: list[int] = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self.fast = bool(getattr(tokenizer, "is_fast", False))
        self.held: list[int] = []  # the end of a document that goes on

    def rows(self, records: Records) -> Iterator[list[Row]]:
        """The rows in lists, in the order of the records.

        Raises UserError on a bad row unless data.bad_rows=skip, and on an over-long one under data.overlong=error.
        """
        where = ""
        for batch in _batches(itertools.islice(records, self.options.limit)):
            where = batch[-1][0]
            yield [row for row in self._batch(batch) if self._kept(row)]
        # a limit may have cut a document
        rest = [row for row in self._windows(where, [], ends=False) if self._kept(row)] if self.held else []
        if rest:
            yield rest
        if self.renderer.folded:
            self.tally.counts["system_folded"] = self.renderer.folded
        if self.renderer.unseen:
            self.tally.counts["tools_unseen"] = self.renderer.unseen

    def _batch(self, batch: list[tuple[str, dict[str, Any] | Bad]]) -> Iterator[Row]:
        meant: list[tuple[str, Rendered | Text]] = []
        for where, record in batch:
            self.tally.counts["read"] += 1
            try:
                meant += [(where, one) for one in self._meaning(where, record)]
            except RowError as error:
                first = isinstance(error, ColumnsError) and self.tally.counts["read"] == 1
                self._bad(where, str(error), first or (isinstance(record, Bad) and record.hopeless))
        encoded = self._tokenise([one for _, one in meant])
        for (where, one), (ids, learn) in zip(meant, encoded, strict=True):
            yield from self._text(where, one, ids) if isinstance(one, Text) else self._chat(where, ids, learn)

    def _meaning(self, where: str, record: dict[str, Any] | Bad) -> list[Rendered] | list[Text]:
        if isinstance(record, Bad):
            raise RowError(record.why)
        shape = read(record, self.options)
        if isinstance(shape, Text):
            if not shape.text.strip() and not shape.continues and not self.held:
                self.tally.leave("nothing_to_learn", where, "the text is empty")
                return []
            return [shape]
        rendered = self.renderer.render(shape)
        if not rendered:
            self.tally.leave("nothing_to_learn", where, _nothing(shape))
        self.tally.counts["turns_apart"] += len(rendered) if len(rendered) > 1 else 0
        return rendered

    def _bad(self, where: str, why: str, hopeless: bool) -> None:
        if self.options.bad_rows == "error":
            advice = "" if hopeless else ". (data.bad_rows=skip leaves such rows out)"
            raise UserError(f"{where}: {why}{advice}")
        self.tally.leave("bad", where, why)

    def _chat(self, where: str, ids: np.ndarray, learn: np.ndarray) -> Iterator[Row]:
        if len(ids) <= self.room:
            yield Row(where, ids, learn)
        elif self._overlong(where, len(ids)):
            self.tally.counts["truncated"] += 1
            yield Row(where, ids[: self.room], learn[: self.room])

    def _text(self, where: str, text: Text, ids: np.ndarray) -> Iterator[Row]:
        size = len(ids) + len(self.bos) + 1
        whole = not text.continues and not self.held
        if whole and size <= self.room:
            yield self._document(where, ids)
        elif not whole or self._overlong(where, size):
            yield from self._windows(where, ids.tolist(), ends=not text.continues)

    def _document(self, where: str, ids: np.ndarray) -> Row:
        """A text that fits, with BOS where the tokenizer starts with one, and EOS."""
        eos = self.tokenizer.eos_token_id
        end = [] if len(ids) and ids[-1] == eos else [eos]
        whole = np.concatenate([np.asarray(self.bos, np.int32), ids, np.asarray(end, np.int32)])
        learn = np.ones(len(whole), np.uint8)
        learn[: len(self.bos)] = 0
        return Row(where, whole, learn)

    def _overlong(self, where: str, size: int) -> bool:
        """Whether a row of `size` tokens is kept, cut."""
        why = f"{size:,} tokens, seq_len leaves room for {self.room:,}"
        if self.options.overlong == "error":
            raise UserError(f"{where}: found {why}. Expected data.overlong=truncate or drop, or a larger seq_len")
        if self.options.overlong == "drop":
            self.tally.leave("overlong", where, why)
        return self.options.overlong == "truncate"

    def _windows(self, where: str, ids: list[int], ends: bool) -> Iterator[Row]:
        """Rows of `room` tokens out of a document, of which `ids` is the next stretch."""
        eos, size = self.tokenizer.eos_token_id, self.room - len(self.bos)
        held = self.held + ids
        if ends and held[-1:] != [eos]:
            held.append(eos)
        full = len(held) // size * size
        taken, self.held = (held, []) if ends or not ids else (held[:full], held[full:])
        windows = [taken[i : i + size] for i in range(0, len(taken), size)]
        self.tally.counts["windows"] += len(windows)
        for window in windows:
            learn = [0] * len(self.bos) + [1] * len(window)
            yield Row(where, np.array(self.bos + window, np.int32), np.array(learn, np.uint8))

    def _kept(self, row: Row) -> bool:
        if row.learn[0 if self.prefixed else 1 :].any():
            return True
        self.tally.leave("nothing_to_learn", row.where, f"no learnt token among the first {len(row.ids):,}")
        return False

    def _tokenise(self, meant: list[Rendered | Text]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, learn) of each; of a Text all is learnt."""
        texts = [one.text for one in meant if isinstance(one, Text)]
        chats = [one for one in meant if isinstance(one, Rendered) and not one.guards]
        plain = iter(self._call(texts)["input_ids"] if texts else ())
        tokens = self._offsets([one.text for one in chats]) if self.fast else map(self._slowly, chats)
        for one in meant:
            if isinstance(one, Text):
                ids = np.asarray(next(plain), np.int32)
                yield ids, np.ones(len(ids), np.uint8)
            elif one.guards:
                yield self._guarded(one)
            else:
                ids, starts, ends = next(tokens)
                yield ids, _learnt(starts, ends, one.spans)

    def _offsets(self, texts: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(ids, starts, ends) of each text: the characters that each token covers."""
        if not texts:
            return
        made = self._call(texts, return_offsets_mapping=True)
        for ids, offsets in zip(made["input_ids"], made["offset_mapping"], strict=True):
            places = np.asarray(offsets, np.int64).reshape(-1, 2)
            yield np.asarray(ids, np.int32), places[:, 0], places[:, 1]

    def _slowly(self, one: Rendered) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same from a tokenizer that knows no offsets: each edge of a span is found by encoding up to it."""
        ids = self._call([one.text])["input_ids"][0]
        starts = np.zeros(len(ids), np.int64)
        for edge in sorted({edge for span in one.spans for edge in span}):
            before = self._call([one.text[:edge]])["input_ids"][0]
            agree = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
            starts[min(agree, len(ids)) :] = edge
        return np.asarray(ids, np.int32), starts, starts + 1

    def _guarded(self, one: Rendered) -> tuple[np.ndarray, np.ndarray]:
        """A text in which contents spell control tokens out: those stay text, all else is encoded as ever."""
        ids: list[np.ndarray] = []
        learn: list[np.ndarray] = []
        position = 0
        for guard, group in itertools.groupby(one.text, key=lambda c: c if c in one.guards else ""):
            stretch = "".join(group)
            if guard:
                plain = self._call([one.guards[guard] * len(stretch)], split_special_tokens=True)["input_ids"][0]
                ids.append(np.asarray(plain, np.int32))
                inside = any(a <= position < b for a, b in one.spans)
                learn.append(np.full(len(plain), inside, np.uint8))
            else:
                spans = [(a - position, b - position) for a, b in one.spans]
                piece = Rendered(stretch, [(max(a, 0), b) for a, b in spans if b > 0])
                found, starts, ends = next(self._offsets([stretch])) if self.fast else self._slowly(piece)
                ids.append(found)
                learn.append(_learnt(starts, ends, piece.spans))
            position += len(stretch)
        return np.concatenate(ids), np.concatenate(learn)

    def _call(self, texts: list[str], **more: Any) -> Any:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **more,
        )


def _learnt(starts: np.ndarray, ends: np.ndarray, spans: Iterable[tuple[int, int]]) -> np.ndarray:
    """(tokens,) uint8: 1 where a token covers a character of a span; one that covers none, where it stands in one.

    A token across a span's start (the header's line end joined with an answer's first space) is learnt.
    """
    learn = np.zeros(len(starts), np.uint8)
    for a, b in spans:
        learn |= ((starts < b) & ((ends > a) | ((starts == ends) & (starts == a)))).astype(np.uint8)
    return learn


def _batches(records: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    batch: list[tuple[str, Any]] = []
    size = 0
    for where, record in records:
        batch.append((where, record))
        size += _size(record)
        if len(batch) >= BATCH or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0


def _nothing(chat: Chat) -> str:
    roles = [m["role"] for m in chat.messages]
    if "assistant" not in roles:
        return f"found turns of {', '.join(dict.fromkeys(roles))}, none of the assistant"
    return "each turn of the assistant is empty, or flagged as not learnt"
