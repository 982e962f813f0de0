"""A job's data: sources read, tokenised (once) and split into what is trained and what is held out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ftrun.data import cache as store
from ftrun.data.encode import Encoder, Row, Tally
from ftrun.data.options import DataOptions
from ftrun.data.record import Part
from ftrun.data.rows import Rows
from ftrun.data.sources import held_out_parts, parts
from ftrun.data.template import adopt
from ftrun.errors import UserError

# what does not change a source's rows
_UNCACHED = {"distinct", "held_out", "held_out_most", "held_out_path", "held_out_split", "template"}
_FEW = 4  # held-out rows below which their loss says next to nothing
_COUNTS: tuple[str, ...] = ("read", "bad", "nothing_to_learn", "overlong", "truncated", "windows", "turns_apart")
_COUNTS += ("system_folded", "tools_unseen")


@dataclass(frozen=True)
class Corpus:
    """A job's data. counts: rows read and what became of them; left_out: the first rows that were, {where, what, why};
    sources: {name, rows, weight} of each; template: the chat template's name for people.
    """

    train: Rows
    held_out: Rows
    counts: dict[str, int]
    left_out: list[dict[str, str]]
    sources: list[dict[str, Any]]
    template: str


def load(
    module: ModuleType,
    options: DataOptions,
    tokenizer: Any,
    seq_len: int,
    prefix_ids: tuple[int, ...],
    seed: int,
    cache: Path,
    say: Callable[[str], None],
) -> Corpus:
    """Reads the sources of a format's module, or their tokenised rows under `cache`/data.

    Sets the tokenizer's chat template to the job's (`ftrun.data.template.adopt`). seq_len counts prefix_ids, the
    virtual tokens before each row. seed decides which rows are held out, and which of a mix are taken.
    Raises UserError on anything wrong with the data, naming file and line.
    """
    room = seq_len - len(prefix_ids)
    if room < 2:
        raise UserError(
            f"seq_len={seq_len}: the prompt's {len(prefix_ids)} tokens leave {max(room, 0)} for a row, "
            "expected 2 or more"
        )
    template = adopt(tokenizer, options.template, say)
    stamp = _stamp(tokenizer)
    fetch = functools.partial(
        _fetch, tokenizer=tokenizer, stamp=stamp, room=room, prefixed=bool(prefix_ids), cache=cache, say=say
    )
    own, apart = parts(module, options), held_out_parts(module, options)
    stores = [fetch(part) for part in own]
    tested = [fetch(part) for part in apart]
    together = _together(stores, prefix_ids)
    if not len(together):
        raise UserError(_nothing(stores))
    kept, held = _split(together, stores, options, seed) if not apart else (np.arange(len(together)), None)
    if options.distinct:
        kept = _first_of_each(kept, stores)
        held = None if held is None else _first_of_each(held, stores)
    held_out = _together(tested, prefix_ids) if held is None else together.take(held)
    train = _mixed(together, kept, own, getattr(options, "until", "all"), seed)
    _warn(stores + tested, say)
    if not apart and len(train) < len(held_out):
        say(
            f"warning: data.held_out={options.held_out}: {len(held_out):,} rows are held out, "
            f"{len(train):,}{' distinct' if options.distinct else ''} are left to train on"
        )
    if 0 < len(held_out) < _FEW:
        hint = "; data.held_out=10 holds out ten" if not apart and len(together) > 2 * 10 else ""
        say(f"warning: {len(held_out)} held-out rows are too few to judge by{hint}")
    return Corpus(
        train=train,
        held_out=held_out,
        counts=_counts(stores, train, held_out),
        left_out=[entry for one in stores + tested for entry in one.facts["left_out"]],
        sources=[
            {"name": part.name, "rows": int((train.part == i).sum()), "weight": part.weight}
            for i, part in enumerate(own)
        ],
        template=template,
    )


def _fetch(
    part: Part,
    *,
    tokenizer: Any,
    stamp: str,
    room: int,
    prefixed: bool,
    cache: Path,
    say: Callable[[str], None],
) -> store.Store:
    options = {f.name: getattr(part.options, f.name) for f in dataclasses.fields(part.options)}
    facts = {
        "content": part.fingerprint(),
        "format": type(part.options).__module__,
        "options": {k: v for k, v in options.items() if k not in _UNCACHED},
        "tokenizer": stamp,
        "room": room,
        "prefixed": prefixed,
    }

    def make(tally: Tally) -> Iterator[list[Row]]:
        return Encoder(tokenizer, part.options, room, prefixed, tally).rows(part.records())

    folder = cache / "data" / store.key(facts)
    return store.cached(folder, make, 0 if prefixed else 1, say)


def _stamp(tokenizer: Any) -> str:
    """What identifies a tokenizer: its whole pipeline, special tokens and template."""
    backend = getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
    inside = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    outside = [type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.chat_template]
    text = inside + json.dumps(outside, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _together(stores: list[store.Store], prefix_ids: tuple[int, ...]) -> Rows:
    part = np.concatenate([np.full(len(one), i, np.int32) for i, one in enumerate(stores)])
    row = np.concatenate([np.arange(len(one), dtype=np.int64) for one in stores])
    return Rows(stores, part, row, prefix_ids)


def _split(rows: Rows, stores: list[store.Store], options: DataOptions, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, held-out) indices. A row and its copies fall on the same side; training keeps one row at least."""
    wanted = options.held_out_rows(len(rows))
    _, group, sizes = np.unique(np.concatenate([one.hash for one in stores]), return_inverse=True, return_counts=True)
    if not wanted or len(sizes) < 2:
        return np.arange(len(rows)), np.arange(0)
    if wanted >= len(rows):
        raise UserError(
            f"data.held_out={options.held_out}: found {len(rows):,} rows in all, expected fewer than that held out"
        )
    chosen = np.zeros(len(sizes), bool)
    chosen[_filling(sizes, _random(seed, 0).permutation(len(sizes)), wanted)] = True
    held = chosen[group]
    return np.flatnonzero(~held), np.flatnonzero(held)


def _filling(sizes: np.ndarray, order: np.ndarray, wanted: int) -> list[int]:
    """Groups in the order drawn, as many as make up `wanted` rows; one too large is passed over. One group at least
    is taken, the smallest where none fits, and one at least is left.
    """
    taken: list[int] = []
    left = wanted
    for group in order.tolist():
        if left and sizes[group] <= left and len(taken) < len(sizes) - 1:
            taken.append(group)
            left -= int(sizes[group])
        elif not left:
            break
    return taken or [int(order[sizes[order].argmin()])]


def _first_of_each(indices: np.ndarray, stores: list[store.Store]) -> np.ndarray:
    """Those of the indices whose row has not come before."""
    hashes = np.concatenate([one.hash for one in stores])[indices]
    return indices[np.sort(np.unique(hashes, return_index=True)[1])]


def _mixed(rows: Rows, kept: np.ndarray, own: list[Part], until: str, seed: int) -> Rows:
    """The training rows in the sources' shares: whole passes over a source, then some of its rows by the seed."""
    weights = np.array([part.weight or 0.0 for part in own])
    if not weights.any():
        return rows.take(kept)
    mine = [kept[rows.part[kept] == i] for i in range(len(own))]
    sizes = np.array([len(m) for m in mine], float)
    shares = weights / weights.sum()
    if not sizes.all():
        empty = own[int(np.flatnonzero(sizes == 0)[0])].name
        raise UserError(f"data.sources: {empty} has no row to train on, so it cannot have a share of the mix")
    total = (sizes / shares).max() if until == "all" else (sizes / shares).min()
    taken = []
    for i, (indices, share) in enumerate(zip(mine, shares, strict=True)):
        count = max(1, round(total * share))
        passes, rest = divmod(count, len(indices))
        some = np.sort(_random(seed, 1 + i).choice(indices, rest, replace=False))
        taken.append(np.concatenate([np.tile(indices, passes), some]))
    return rows.take(np.concatenate(taken))


def _random(seed: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, 0xDA7A, purpose]))


def _counts(stores: list[store.Store], train: Rows, held_out: Rows) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in stores:
        total.update(one.facts["counts"])
    hashes = np.concatenate([one.hash for one in stores])
    return {
        **{name: total[name] for name in _COUNTS},
        "duplicates": len(hashes) - len(np.unique(hashes)),
        "train": len(train),
        "held_out": len(held_out),
        "tokens": int(train.lengths.sum(dtype=np.int64)),
        "supervised": int(train.supervised.sum(dtype=np.int64)),
    }


def _nothing(stores: list[store.Store]) -> str:
    total: Counter[str] = Counter()
    for one in stores:
        total.update(one.facts["counts"])
    why = [f"{total[k]:,} {text}" for k, text in _REASONS.items() if total[k]]
    first = next((f" ({e['where']}: {e['why']})" for one in stores for e in one.facts["left_out"]), "")
    return f"data: found no row to train on: {total['read']:,} read, {', '.join(why) or 'none kept'}{first}"


_REASONS = {
    "bad": "that cannot be read",
    "nothing_to_learn": "with nothing to learn",
    "overlong": "longer than seq_len",
}


def _warn(stores: list[store.Store], say: Callable[[str], None]) -> None:
    for kind, text in _REASONS.items():
        count = sum(one.facts["counts"].get(kind, 0) for one in stores)
        first = next((e for one in stores for e in one.facts["left_out"] if e["what"] == kind), None)
        if first:
            rows = "row" if count == 1 else "rows"
            say(f"data: {count:,} {rows} {text} left out; the first: {first['where']}: {first['why']}")
    cut = sum(one.facts["counts"].get("truncated", 0) for one in stores)
    if cut:
        rows = "row" if cut == 1 else "rows"
        say(f"data: {cut:,} {rows} longer than seq_len cut (data.overlong=drop leaves them out)")
    unseen = sum(one.facts["counts"].get("tools_unseen", 0) for one in stores)
    if unseen:
        rows = "row brings" if unseen == 1 else "rows bring"
        say(f"warning: data: {unseen:,} {rows} tools, which the chat template does not show to the model")
