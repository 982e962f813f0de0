"""What a run is judged by at its end, beside the held-out loss: what it broke, how much of its rank it uses, and how
fast it generates. Training itself does not notice: it takes the same steps, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftrun import assemble
from ftrun.data.rows import in_memory
from ftrun.errors import RunFailed, UserError, is_out_of_memory
from ftrun.evals import latency, retention
from ftrun.evals.answer import ends, prompt_ids, room_for
from ftrun.evals.held_out import evaluate
from ftrun.memory.device import SHARE, resolve
from ftrun.models.forward import attention
from ftrun.runs import read_json, write_json
from ftrun.values import EvalRecord

if TYPE_CHECKING:
    from ftrun.tasks.session import Session


class Judge:
    """figures: result.json's `retention`, `effective_rank` and `latency`, null where they are not measured."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.figures: dict[str, Any] = dict.fromkeys(("retention", "effective_rank", "latency"))
        self.text: retention.Text | None = None
        self.base_ms: float | None = None  # of a method that changes the base itself

    def before(self) -> None:
        """Ahead of the first step: the base's own text; the base's latency where it cannot be had back later."""
        options = self.session.options
        if options.evaluates and options.retention:
            with self._sparing("retention"):
                self.text = self._base_text()
        if options.evaluates and options.latency and not self.session.parts.tuner.switchable:
            with self._sparing("latency"):
                self.base_ms = self._changing_base_ms()

    def after(self) -> None:
        """On the final weights, once they are handed over: a merged model drops the optimiser's state."""
        options = self.session.options
        self.figures["effective_rank"] = self._effective_rank()
        if self.text is not None:
            with self._sparing("retention"):
                found = self._scored(self.text.ids, self.session.corpus.train.prefix_ids)
                self.figures["retention"] = retention.figures(self.text, found.loss)
        if options.evaluates and options.latency:
            with self._sparing("latency"):
                self.figures["latency"] = self._latency()

    # --- retention ---

    def _base_text(self) -> retention.Text | None:
        """From the cache, or written now by the base; None, said aloud, where that cannot be."""
        s, tuner, vocabulary = self.session, self.session.parts.tuner, self.session.parts.base.rows
        start = retention.start_of(s.parts.base.tokenizer(), vocabulary)
        # after training the virtual tokens stand in front of the rows
        tokens = room_for(s.work.model, tuner.prefix + 1, s.options.retention_tokens)
        if start is None or not tokens:
            why = "the tokenizer has neither bos nor eos" if start is None else "the model has no position for it"
            s.console.say(f"retention: not measured: there is no text to begin: {why}")
            return None
        path = self._kept_at(start, tokens)
        found = _read(path, vocabulary)
        if found is None and s.progress.step and not tuner.switchable:
            s.console.say(
                f"retention: not measured: after step {s.progress.step} of method={s.job.method.choice} the base "
                "cannot be had back, and its own text is not in the cache"
            )
            return None
        began = time.perf_counter()
        text = self._as_here(self._written(path, start, tokens) if found is None else found)
        how = f"{time.perf_counter() - began:.1f} s" if found is None else "from the cache"
        rows = f"{len(text.ids)} rows of {text.tokens:,} tokens"
        s.console.say(f"retention: the base wrote {rows}, its loss on them {text.loss:.4f} ({how})")
        return text

    def _as_here(self, text: retention.Text) -> retention.Text:
        """The text with its loss as this run's model gives it while it is still the base: beside an adapter that does
        nothing yet, 16-bit sums are rounded otherwise than without one, which is no rise.
        """
        if self.session.progress.step or getattr(self.session.parts.tuner.options, "from_", None):
            return text
        return dataclasses.replace(text, loss=self._scored(text.ids, ()).loss)

    def _written(self, path: Path, start: int, tokens: int) -> retention.Text:
        s = self.session
        with self._base():
            self._check([[start, start]])
            with attention(s.work.model, "sdpa"), s.work.autocast():
                tokenizer = s.parts.base.tokenizer()
                ids = retention.write(s.work.model, tokenizer, start, s.options.retention, tokens, s.job.seed)
            found = self._check(ids)
        text = retention.Text(ids, found.loss, found.tokens)
        try:
            write_json(path, dataclasses.asdict(text))
        except OSError as error:
            s.console.say(f"warning: the base's own text is not kept in {path.parent}: {error.strerror or error}")
        return text

    def _check(self, ids: list[list[int]]) -> EvalRecord:
        """The base's loss on rows. Raises RunFailed where it is no number: nothing could be sampled."""
        found = self._scored(ids, ())
        if not math.isfinite(found.loss):
            cause = "the base's own weights give no number: are they damaged?"
            raise RunFailed(f"retention at step {found.step}: loss {found.loss}: not finite; {cause}")
        return found

    def _scored(self, ids: list[list[int]], prefix: Sequence[int]) -> EvalRecord:
        """The loss on rows, all but their first token, by the run's own loss and in micro-batches of its own size."""
        s = self.session
        rows = in_memory([(row, [0] + [1] * (len(row) - 1)) for row in ids], tuple(prefix))
        corpus = dataclasses.replace(s.corpus, held_out=rows)
        batches = assemble.evaluation_batches(s.job, corpus, None, s.settled.micro_batch, s.pad_id)
        return evaluate(s.work.model, s._loss, batches, s.progress.step)

    def _kept_at(self, start: int, tokens: int) -> Path:
        """Where the base's own text is kept: by all that it depends on, the method not among it."""
        s, job, base = self.session, self.session.job, self.session.parts.base
        facts = [base.hash(), s.parts.quantiser.scheme(), job.model.options.dtype, job.kernels, s.device.type]
        facts += [job.model.options.new_tokens, start, ends(s.work.model, base.tokenizer())]
        facts += [s.options.retention, tokens, job.seed, torch.__version__]
        digest = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
        return s.cache / "retention" / f"{digest[:32]}.json"

    def _base(self) -> contextlib.AbstractContextManager[None]:
        """The base alone; of a method that changes the base itself, the model as it is, before its first step."""
        tuner = self.session.parts.tuner
        return tuner.disabled(self.session.work.model) if tuner.switchable else contextlib.nullcontext()

    # --- effective rank ---

    def _effective_rank(self) -> dict[str, Any] | None:
        """None of a method without a rank. rank: the job's; by method.rank_pattern a module may have another."""
        tuner = self.session.parts.tuner
        found = tuner.effective_ranks(self.session.work.model)
        if not found:
            return None
        ranks = list(found.values())
        return {
            "mean": sum(ranks) / len(ranks),
            "lowest": min(ranks),
            "highest": max(ranks),
            "rank": tuner.options.rank,
            "by_module": {name: round(value, 4) for name, value in found.items()},
        }

    # --- latency ---

    def _latency(self) -> dict[str, Any] | None:
        """Milliseconds a token of the base, of the tuned model as it is, and of the merged one.

        The base is the model with its adapter switched off; for method=full, the model before its first step, in the
        dtype that it trains in. Virtual tokens stand before the tuned model's prompt. Null: not to be had.
        """
        s, tuner = self.session, self.session.parts.tuner
        if (asked := self._asked()) is None:
            why = "give eval.prompt, there is no held-out row to take one from, or it fills the model's positions"
            s.console.say(f"latency: not measured: no prompt that can be answered: {why}")
            return None
        prompt, tokens = asked
        base = self.base_ms
        if tuner.switchable:
            with tuner.disabled(s.work.model):
                base = self._timed(prompt, tokens)
        own = self._timed([*s.corpus.train.prefix_ids, *prompt], tokens)
        merged = self._merged_ms(prompt, tokens) if tuner.merges else None
        return {"tokens": tokens, "base_ms": base, "unmerged_ms": own, "merged_ms": merged, "merges": tuner.merges}

    def _changing_base_ms(self) -> float | None:
        s, asked = self.session, self._asked()
        if s.progress.step:
            s.console.say(
                f"latency: not measured of the base: after step {s.progress.step} of method={s.job.method.choice} it "
                "cannot be had back"
            )
        return None if asked is None or s.progress.step else self._timed(*asked)

    def _asked(self) -> tuple[list[int], int] | None:
        """The prompt, and how many tokens are to follow it; None without either."""
        s = self.session
        if s.options.prompt is None and not len(s.corpus.held_out):
            return None
        prompt = prompt_ids(s.options.prompt, s.parts.base.tokenizer(), s.corpus.held_out)
        tokens = room_for(s.work.model, s.parts.tuner.prefix + len(prompt), s.options.latency)
        return (prompt, tokens) if prompt and tokens else None

    def _timed(self, prompt: list[int], tokens: int) -> float:
        s = self.session
        with attention(s.work.model, "sdpa"), s.work.autocast():
            return latency.milliseconds(s.work.model, s.parts.base.tokenizer(), prompt, tokens)

    def _merged_ms(self, prompt: list[int], tokens: int) -> float | None:
        """None, said aloud, where the memory is short: all wrapped layers then have a plain copy beside them."""
        s, tuner = self.session, self.session.parts.tuner
        s.work.optimiser.zero_grad(set_to_none=True)
        s.work.optimiser.state.clear()
        needed, free = tuner.merging_bytes(s.work.model, s.parts.base.dtype), self._free_bytes()
        if needed > free:
            sizes = f"{needed / 1e9:.2f} GB beside the others, {free / 1e9:.2f} GB are free"
            s.console.say(f"latency: not measured merged: the merged layers take {sizes}")
            return None
        with self._sparing("latency, merged"):
            try:
                tuner.merge(s.work.model)
                return self._timed(prompt, tokens)
            finally:
                tuner.unmerge(s.work.model)
        return None

    def _free_bytes(self) -> int:
        """What can be had now, with what torch keeps of its own."""
        device = resolve(self.session.job.device.typed())
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() if device.type == "cuda" else 0
        return int(SHARE[device.type] * (device.free_bytes + kept))

    @contextlib.contextmanager
    def _sparing(self, what: str) -> Iterator[None]:
        """No figure is worth the run: one that takes more memory than there is stays null."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.session.console.say(f"{what}: not measured: out of memory: {str(error).splitlines()[0][:200]}")


def _read(path: Path, vocabulary: int) -> retention.Text | None:
    """The text that is kept; None where there is none, or a damaged one, which is written again."""
    try:
        return retention.Text.read(read_json(path), vocabulary)
    except UserError:
        return None
