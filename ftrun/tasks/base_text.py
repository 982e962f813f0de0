"""What measures retention: text that the untuned base wrote, kept in the cache, and the loss of any rows of text."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftrun import assemble, stepping
from ftrun.data.load import Corpus
from ftrun.data.rows import in_memory
from ftrun.errors import RunFailed, UserError
from ftrun.evals import retention
from ftrun.evals.answer import ends, room_for
from ftrun.evals.held_out import evaluate
from ftrun.job import Job
from ftrun.models.forward import attention
from ftrun.runs import read_json, write_json
from ftrun.values import Batch, EvalRecord

Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A model that is judged: a job's, in training or opened again. step: how many steps it has trained so far; of an
    opened one that is its method's base itself, 0.
    """

    job: Job
    parts: assemble.Sketch
    corpus: Corpus
    loss: Callable[[Batch], torch.Tensor]
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    micro_batch: int
    pad_id: int
    device: str  # its type
    cache: Path
    say: Say
    step: int = 0
    run: Callable[..., Any] = lambda call, *args: call(*args)  # what runs the model where ranks share it
    told: Callable[[Any], Any] = lambda value: value  # the first rank's value, on all of them

    def scored(self, ids: list[list[int]], prefix: Sequence[int]) -> EvalRecord:
        """The loss on rows, all but their first token, by the job's own loss and in micro-batches of its own size."""
        rows = in_memory([(row, [0] + [1] * (len(row) - 1)) for row in ids], tuple(prefix))
        corpus = dataclasses.replace(self.corpus, held_out=rows)
        batches = stepping.evaluation_batches(self.job, corpus, None, self.micro_batch, self.pad_id)
        return evaluate(self.parts.model, self.loss, batches, self.step)


def base_text(subject: Subject, rows: int, tokens: int) -> retention.Text | None:
    """So many rows of the base's own, from the cache or written now; None, said aloud, where that cannot be."""
    s, tuner, vocabulary = subject, subject.parts.tuner, subject.parts.base.rows
    start = retention.start_of(s.parts.base.tokenizer(), vocabulary)
    # after training the virtual tokens stand in front of the rows
    tokens = room_for(s.parts.model, tuner.prefix + 1, tokens)
    if start is None or not tokens:
        why = "the tokenizer has neither bos nor eos" if start is None else "the model has no position for it"
        s.say(f"retention: not measured: there is no text to begin: {why}")
        return None
    path = _kept_at(s, start, rows, tokens)
    # another job may write it between two ranks' looks
    found = retention.Text.read(s.told(_read(path, vocabulary)), vocabulary)
    if found is None and s.step and not tuner.switchable:
        s.say(
            f"retention: not measured: after step {s.step} of method={s.job.method.choice} the base "
            "cannot be had back, and its own text is not in the cache"
        )
        return None
    began = time.perf_counter()
    text = _as_here(s, _written(s, path, start, rows, tokens) if found is None else found)
    how = f"{time.perf_counter() - began:.1f} s" if found is None else "from the cache"
    shown = f"{len(text.ids)} rows of {text.tokens:,} tokens"
    s.say(f"retention: the base wrote {shown}, its loss on them {text.loss:.4f} ({how})")
    return text


def _as_here(s: Subject, text: retention.Text) -> retention.Text:
    """The text with its loss as this run's model gives it while it is still the base: beside an adapter that does
    nothing yet, 16-bit sums are rounded otherwise than without one, which is no rise.
    """
    if s.step or getattr(s.parts.tuner.options, "from_", None):
        return text
    return dataclasses.replace(text, loss=s.scored(text.ids, ()).loss)


def _written(s: Subject, path: Path, start: int, rows: int, tokens: int) -> retention.Text:
    with _base(s):
        _check(s, [[start, start]])
        with attention(s.parts.model, "sdpa"), s.autocast():
            tokenizer = s.parts.base.tokenizer()
            ids = s.run(retention.write, s.parts.model, tokenizer, start, rows, tokens, s.job.seed)
        found = _check(s, ids)
    text = retention.Text(ids, found.loss, found.tokens)
    try:
        write_json(path, dataclasses.asdict(text))
    except OSError as error:
        s.say(f"warning: the base's own text is not kept in {path.parent}: {error.strerror or error}")
    return text


def _check(s: Subject, ids: list[list[int]]) -> EvalRecord:
    """The base's loss on rows. Raises RunFailed where it is no number: nothing could be sampled."""
    found = s.scored(ids, ())
    if not math.isfinite(found.loss):
        cause = "the base's own weights give no number: are they damaged?"
        raise RunFailed(f"retention at step {found.step}: loss {found.loss}: not finite; {cause}")
    return found


def _kept_at(s: Subject, start: int, rows: int, tokens: int) -> Path:
    """Where the base's own text is kept: by all that it depends on, the method not among it."""
    job, base = s.job, s.parts.base
    facts = [base.hash(), s.parts.quantiser.scheme(), job.model.options.dtype, job.kernels, s.device]
    facts += [job.model.options.new_tokens, start, ends(s.parts.model, base.tokenizer())]
    facts += [rows, tokens, job.seed, torch.__version__]
    digest = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
    return s.cache / "retention" / f"{digest[:32]}.json"


def _base(s: Subject) -> contextlib.AbstractContextManager[None]:
    """The base alone; of a method that changes the base itself, the model as it is, before its first step."""
    tuner = s.parts.tuner
    return tuner.disabled(s.parts.model) if tuner.switchable else contextlib.nullcontext()


def _read(path: Path, vocabulary: int) -> dict[str, Any] | None:
    """The text that is kept; None where there is none, or a damaged one, which is written again."""
    try:
        found = retention.Text.read(read_json(path), vocabulary)
    except UserError:
        return None
    return dataclasses.asdict(found) if found else None
