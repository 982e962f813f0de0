"""Many prompts answered at once: padded on the left, with the cache, each to its own end.

A row's answer does not hang on the others beside it: padding is masked and moves no position, a row that has ended
leaves the batch, and each row draws from a generator of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ftrun.errors import UserError
from ftrun.evals.answer import ends, room_for

Meet = Callable[[Sequence[int]], None]
_HALF = "\ufffd"  # what a decoder gives for bytes that are no whole character


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature 0: the likeliest; top_k 0 and top_p 1 cut nothing off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """ids: the new tokens, without the one that ended them. ended: whether one did, or the room for tokens."""

    ids: list[int]
    text: str
    ended: bool


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling = Sampling(),
    meet: Meet | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Answer]:
    """What the model writes after each prompt, `tokens` at most; the prompts run as one batch. See `each_token`."""
    found: list[list[int]] = [[] for _ in prompts]
    for row, token in each_token(model, tokenizer, prompts, tokens, sampling, meet, numbers):
        found[row].append(token)
    last = ends(model, tokenizer)
    ended = [bool(row) and row[-1] in last for row in found]
    kept = [row[:-1] if done else row for row, done in zip(found, ended, strict=True)]
    return [Answer(row, decoded(tokenizer, row).strip(), done) for row, done in zip(kept, ended, strict=True)]


def pieces(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    tokens: int,
    sampling: Sampling = Sampling(),
    meet: Meet | None = None,
) -> Iterator[str]:
    """One prompt's answer as it is written: pieces of text that end between characters, and together are it."""
    last, written = ends(model, tokenizer), Written(tokenizer)
    for _, token in each_token(model, tokenizer, [prompt], tokens, sampling, meet):
        if token not in last and (piece := written.add(token)):
            yield piece
    if piece := written.rest():
        yield piece


def each_token(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling = Sampling(),
    meet: Meet | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[tuple[int, int]]:
    """(row, token) in the order in which they come: a row's own up to its end token, that one with it.

    prompts: token ids, virtual ones (beyond the vocabulary) in front. meet: told before each pass which rows are in
    the batch, where that changes. numbers: what each row's draws depend on beside the seed, by default its place here.
    Dropout is off meanwhile. Raises UserError where a prompt is empty or leaves no position for an answer.
    """
    rooms = [_room(model, len(prompt), tokens, row) for row, prompt in enumerate(prompts)]
    with _evaluating(model):
        batch = _Batch(model, prompts, tokenizer)
        if meet is not None:
            meet(batch.rows)
        chooser = Chooser(sampling, range(len(prompts)) if numbers is None else numbers)
        last, count = set(ends(model, tokenizer)), 0
        while batch.rows and tokens:
            chosen = chooser(batch.logits(), batch.rows)
            count += 1
            yield from zip(batch.rows, found := chosen.tolist(), strict=True)
            going = [i for i, row in enumerate(batch.rows) if found[i] not in last and count < rooms[row]]
            left = len(going) < len(batch.rows)
            batch.go_on(chosen, going)
            if meet is not None and left and batch.rows:
                meet(batch.rows)


class _Batch:
    """The rows that are still written: their last tokens, and the cache of all before. rows: their numbers."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], tokenizer: Any) -> None:
        from transformers import DynamicCache

        self.model, self.rows = model, list(range(len(prompts)))
        self.cache: Any = DynamicCache(config=model.config)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max()) if prompts else 0
        fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        ids = [[fill] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        self.ids = torch.tensor(ids, dtype=torch.int64).to(model.device)
        before = width - lengths[:, None]
        places = torch.arange(width)[None] - before
        self.positions = places.clamp_min(0).to(model.device)
        # without padding there is nothing to mask, and attention is faster without a mask
        self.mask = (places >= 0).long().to(model.device) if bool(before.any()) else None
        known = inspect.signature(model.forward).parameters
        self._last_alone = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """(rows, V) float32: of what follows each row's last token."""
        out = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            **self._last_alone,
        )
        found: torch.Tensor = out.logits[:, -1].float()
        return found

    def go_on(self, chosen: torch.Tensor, going: list[int]) -> None:
        """Takes the chosen tokens (rows,) in; the places that are not in `going` leave the batch."""
        self.ids, self.positions = chosen[:, None], self.positions[:, -1:] + 1
        if len(going) < len(self.rows):
            self.rows = [self.rows[i] for i in going]
            if not going:
                return
            index = torch.tensor(going, device=chosen.device)
            self.cache.batch_select_indices(index)
            self.ids, self.positions = self.ids[index], self.positions[index]
            self.mask = None if self.mask is None else self.mask[index]
            if self.mask is not None and bool(self.mask.all()):
                self.mask = None
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], 1)


class Chooser:
    """Chooses a token of each row. numbers: by which, with the seed, each row draws its own numbers."""

    def __init__(self, sampling: Sampling, numbers: Sequence[int]) -> None:
        self.sampling = sampling
        self.generators = [_generator(sampling.seed, number) for number in numbers] if sampling.temperature else []

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """logits (rows, V) of the rows of these places -> (rows,) int64."""
        if not self.sampling.temperature:
            return logits.argmax(-1)
        # one number a token, and the place where the sums of the probabilities pass it: the same on every device
        drawn = torch.stack([torch.rand((), generator=self.generators[row]) for row in rows]).double()
        sums = probabilities(logits, self.sampling).double().cumsum(-1)
        reached = drawn.to(sums.device)[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, reached, right=True).squeeze(-1)


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """(rows, V) float32 -> the distribution that is drawn from, (rows, V): of the top_k likeliest tokens those whose
    likelier ones have not yet reached top_p together; never none.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    found = logits.softmax(-1)
    if sampling.top_p < 1:
        sizes, order = found.sort(dim=-1, descending=True, stable=True)
        cut = sizes.cumsum(-1) - sizes >= sampling.top_p
        cut[:, 0] = False
        found = found.scatter(-1, order, sizes.masked_fill(cut, 0))
    return found


class Written:
    """Tokens as text while they come, in pieces that end between characters.

    Tokens are decoded beside the few before them, since a decoder may write a token otherwise at a text's beginning.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._from = self._to = 0  # of the tokens that stand before the new ones

    def add(self, token: int) -> str:
        """The text that this token completes, "" where it ends within a character."""
        self.ids.append(token)
        before, text = self._both()
        if len(text) <= len(before) or text.endswith(_HALF):
            return ""
        self._from, self._to = self._to, len(self.ids)
        return text[len(before) :]

    def rest(self) -> str:
        """What is left at the end, without the beginning of a character that was never finished."""
        before, text = self._both()
        self._from = self._to = len(self.ids)
        return text[len(before) :].rstrip(_HALF)

    def _both(self) -> tuple[str, str]:
        return _text(self.tokenizer, self.ids[self._from : self._to]), _text(self.tokenizer, self.ids[self._from :])


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as text, special ones left out, without the beginning of a character that was never finished."""
    return _text(tokenizer, ids).rstrip(_HALF)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _room(model: Any, used: int, tokens: int, row: int) -> int:
    if not used:
        raise UserError(f"prompt {row + 1}: holds no token; expected one at least")
    room = room_for(model, used, tokens)
    if tokens and not room:
        most = model.table_of_positions
        raise UserError(f"prompt {row + 1}: {used} tokens; the model has {most} positions, the answer's counted")
    return room


def _generator(seed: int, number: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
