"""What `ftrun eval` measures of a run that was opened again: the base and the tuned model, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ftrun import stepping
from ftrun.data.rows import Rows, in_memory
from ftrun.errors import UserError
from ftrun.evals import exact, kinds, retention
from ftrun.evals.divergence import Scored, View, divergence, score
from ftrun.evals.generation import answers
from ftrun.evals.held_out import evaluate
from ftrun.tasks.base_text import Subject, base_text
from ftrun.tasks.judging import effective_rank
from ftrun.tasks.pace import Pace
from ftrun.tasks.tuned import Tuned
from ftrun.values import Batch


class Look:
    """One of the models that an opened run holds: its base (scale 0), or so much of what it learnt.

    Through scale 0 the base is seen where the method has one: its sums are then rounded as beside an adapter. Of
    prompt tuning the base has no virtual tokens in front.
    """

    def __init__(self, opened: Tuned, options: Any, factor: float) -> None:
        self.opened, self.options, self.factor = opened, options, factor
        tuner = opened.tuner
        self.plain = bool(tuner.prefix) and factor == 0
        self.prefix = () if self.plain else tuple(opened.corpus.held_out.prefix_ids)

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        """The model is this one, for a while."""
        opened = self.opened
        switched = contextlib.nullcontext() if not opened.tuner.switchable else opened.scaled(self.factor)
        with opened.base() if self.plain else switched:
            yield

    @cached_property
    def batches(self) -> Sequence[Batch]:
        """The held-out rows, with the virtual tokens where this model has them."""
        opened, rows = self.opened, self.opened.corpus.held_out
        if rows.prefix_ids:
            rows = _prefixed(rows, self.prefix)
        corpus = replace(opened.corpus, held_out=rows)
        return stepping.evaluation_batches(opened.job, corpus, self.options.rows, opened.micro_batch, opened.pad_id)

    def view(self) -> View:
        """For evaluations by the token."""

        def states(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            with self.opened.autocast():
                return self.opened.token_loss.supervised(batch.to(self.opened.device))

        return View(self.batches, states, self._logits, self.within)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with self.opened.autocast():
            return self.opened.token_loss.told(hidden)

    def held_out(self) -> dict[str, float]:
        """The mean loss, perplexity, and the tokens that they are of."""
        with self.within():
            found = asdict(evaluate(self.opened.model, self.opened.loss, self.batches, 0))
        return {key: found[key] for key in ("loss", "perplexity", "tokens")}

    def text_loss(self, ids: list[list[int]]) -> float:
        """Of rows of text."""
        with self.within():
            return subject(self.opened).scored(ids, self.prefix).loss

    def scored(self) -> Scored:
        """Each held-out token's loss."""
        return score(self.view())

    def exact(self, how: exact.Exact, questions: Sequence[exact.Question]) -> dict[str, Any]:
        """Exact match, by generation."""
        opened = self.opened
        pace = Pace(opened.say, "exact: {done} of {whole} rows answered", len(questions))

        def generate(prompts: list[list[int]]) -> list[str]:
            found = answers(opened.model, opened.tokenizer, prompts, self.options.exact_tokens)
            pace.add(len(prompts))
            return [one.text for one in found]

        with self.within(), opened.generating():
            return exact.measure(how, questions, generate, self.prefix)


def _prefixed(rows: Rows, prefix: tuple[int, ...]) -> Rows:
    """The rows with other virtual tokens in front, or none; a row's first own token is not learnt in either."""
    before = len(rows.prefix_ids)
    pairs = [(rows.ids(i)[before:].tolist(), [0, *rows.learn(i)[before + 1 :].tolist()]) for i in range(len(rows))]
    return in_memory(pairs, prefix)


def subject(opened: Tuned, step: int = 1) -> Subject:
    """An opened run as what is judged."""
    return Subject(
        job=opened.job,
        parts=opened.parts,
        corpus=opened.corpus,
        loss=opened.loss,
        autocast=opened.autocast,
        micro_batch=opened.micro_batch,
        pad_id=opened.pad_id,
        device=opened.device.type,
        cache=opened.cache,
        say=opened.say,
        step=step,
    )


class Measuring:
    """The base and the tuned model of a run. base: a second model, of a method that changes the base's own weights."""

    def __init__(self, tuned: Tuned, base: Tuned | None, options: Any) -> None:
        self.tuned, self.options, self.say = tuned, options, tuned.say
        self.before = Look(base or tuned, options, 0.0)

    def at(self, factor: float) -> Look:
        """The tuned model with so much of its update."""
        return Look(self.tuned, self.options, factor)

    @cached_property
    def text(self) -> retention.Text | None:
        """The base's own, with its loss as the base here gives it."""
        if not self.options.retention:
            return None
        whole = self.before.opened is not self.tuned
        found = base_text(subject(self.before.opened, 0 if whole else 1), *self._amount())
        return None if found is None else replace(found, loss=self.before.text_loss(found.ids))

    def _amount(self) -> tuple[int, int]:
        return self.options.retention, self.options.retention_tokens

    @cached_property
    def file(self) -> retention.Text | None:
        """The held-out text of a file as rows, with the base's loss on them."""
        if self.options.retention_path is None:
            return None
        ids = text_rows(self.tuned, Path(self.options.retention_path).expanduser(), self.options.rows)
        return retention.Text(ids, self.before.text_loss(ids), sum(len(row) - 1 for row in ids))

    @cached_property
    def questions(self) -> list[exact.Question]:
        """The held-out rows that ask something and leave room for an answer, as many as are to be answered."""
        rows, tokenizer = self.tuned.corpus.held_out, self.tuned.tokenizer
        before, found = len(rows.prefix_ids), []
        most = getattr(self.tuned.model, "table_of_positions", None)
        for i in range(len(rows)):
            one = exact.question(rows.ids(i)[before:].tolist(), rows.learn(i)[before:].tolist(), tokenizer)
            if one is not None and (most is None or before + len(one.prompt) < most):
                found.append(one)
            if len(found) == self.options.exact_rows:
                break
        return found

    @cached_property
    def how(self) -> exact.Exact | None:
        """By which answers are compared; None where they are not."""
        kind = self.options.exact
        if kind in (None, "none"):
            return None
        if kind == "auto":
            if (found := exact.chosen(self.questions)) is None:
                self.say(
                    "exact: not measured: the held-out answers hold no number and no JSON to compare by; "
                    "eval.exact=regex eval.pattern='…' compares what a pattern of yours finds in them"
                )
            return found
        made = exact.Exact(kind, self.options.pattern)
        if not any(made.answer(q.reference) is not None for q in self.questions):
            raise UserError(
                f"eval.exact={kind}: no held-out answer of {len(self.questions)} holds one; expected rows with a "
                "prompt and such an answer"
            )
        return made

    def kept_text(self, after: Look, text: retention.Text | None) -> dict[str, float] | None:
        """The rise in loss on a text of the base's own or of a file."""
        return None if text is None else retention.figures(text, after.text_loss(text.ids))

    def exactly(self, look: Look) -> dict[str, Any] | None:
        """Exact match of one of the models; None where it is not measured."""
        return None if self.how is None else look.exact(self.how, self.questions)

    def figures(self, factor: float) -> dict[str, Any]:
        """Everything but the quantisation's drop, before and after."""
        after, rows = self.at(factor), sum(len(batch.rows) for batch in self.before.batches)
        self.say(f"held-out loss: {rows} rows, before and after")
        found: dict[str, Any] = {"held_out": {"before": self.before.held_out(), "after": after.held_out()}}
        if self.options.agreement:
            self.say("agreement with the base: the same rows, token by token")
        found["agreement"] = divergence(self.before.view(), after.view()) if self.options.agreement else None
        if self.options.retention:
            self.say(f"retention: the loss on {self.options.retention} rows that the base writes, or has written")
        found["retention"] = self.kept_text(after, self.text)
        found["retention_text"] = self.kept_text(after, self.file)
        found["effective_rank"] = effective_rank(self.tuned.parts)
        found["exact"] = None
        if self.how is not None:
            self.say(f"exact: {len(self.questions)} rows answered, twice, by up to {self.options.exact_tokens} tokens")
            sides = {"before": self.exactly(self.before), "after": self.exactly(after)}
            found["exact"] = {"by": self.how.kind, "pattern": self.how.pattern, **sides}
        return found

    def trade(self, factors: Sequence[float]) -> list[dict[str, Any]]:
        """At each scale the task's loss, and what was lost for it."""
        found = []
        for factor in factors:
            self.say(f"measuring at scale={factor:g}")
            look = self.at(factor)
            kept, matched = self.kept_text(look, self.text), self.exactly(look)
            row: dict[str, Any] = {"scale": factor, **look.held_out()}
            row["retention"] = None if kept is None else kept["after"]
            row["rise"] = None if kept is None else kept["rise"]
            row["exact"] = None if matched is None else matched["share"]
            found.append(row)
        return found


def text_rows(opened: Tuned, path: Path, most: int | None) -> list[list[int]]:
    """A text file as rows of the job's length, each behind the token that a text starts from where there is one.

    Raises UserError where it cannot be read or holds no two tokens.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"eval.retention_path={path}: not readable as text: {error}") from error
    start = retention.start_of(opened.tokenizer, opened.parts.base.rows)
    first = [] if start is None else [start]
    room = opened.job.seq_len - opened.tuner.prefix - len(first)
    ids = opened.tokenizer(text, add_special_tokens=False).input_ids
    rows = [[*first, *ids[i : i + room]] for i in range(0, len(ids), room)] if room > 1 else []
    rows = [row for row in rows if len(row) > 1][:most]
    if not rows:
        raise UserError(f"eval.retention_path={path}: holds {len(ids)} tokens; expected a text of two or more")
    return rows


def by_kind(scored: Scored, masks: dict[str, torch.Tensor], likeliest: torch.Tensor | None) -> dict[str, Any]:
    """A model's losses by kind of token; agreement: the share of tokens for which it holds the same likeliest."""
    found: dict[str, Any] = {"loss": float(scored.losses.double().mean()), **kinds.by_kind(scored.losses, masks)}
    same = None if likeliest is None else float((scored.likeliest == likeliest).double().mean())
    return {**found, "agreement": same}
