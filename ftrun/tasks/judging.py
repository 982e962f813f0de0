"""What a run is judged by at its end, beside the held-out loss: what it broke, how much of its rank it uses, and how
fast it generates. Training itself does not notice: it takes the same steps, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ftrun import assemble
from ftrun.errors import is_out_of_memory
from ftrun.evals import latency, retention
from ftrun.evals.answer import prompt_ids, room_for
from ftrun.memory.device import SHARE, resolve
from ftrun.models.forward import attention
from ftrun.tasks.base_text import Subject, base_text

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
            with self.sparing("retention"):
                self.text = base_text(self._subject(), options.retention, options.retention_tokens)
        if options.evaluates and options.latency and not self.session.parts.tuner.switchable:
            with self.sparing("latency"):
                self.base_ms = self._changing_base_ms()

    def after(self) -> None:
        """On the final weights, once they are handed over: a merged model drops the optimiser's state."""
        options = self.session.options
        self.figures["effective_rank"] = effective_rank(self.session.parts)
        if self.text is not None:
            with self.sparing("retention"):
                found = self._subject().scored(self.text.ids, self.session.corpus.train.prefix_ids)
                self.figures["retention"] = retention.figures(self.text, found.loss)
        if options.evaluates and options.latency:
            with self.sparing("latency"):
                self.figures["latency"] = self._latency()

    def _subject(self) -> Subject:
        s = self.session
        return Subject(
            job=s.job,
            parts=s.parts,
            corpus=s.corpus,
            loss=s._loss,
            run=s.work.parallel.run,
            told=s.ranks.told,
            autocast=s.work.autocast,
            micro_batch=s.settled.micro_batch,
            pad_id=s.pad_id,
            device=s.device.type,
            cache=s.cache,
            say=s.console.say,
            step=s.progress.step,
        )

    # --- latency ---

    def _latency(self) -> dict[str, Any] | None:
        """Milliseconds a token of the base, of the tuned model as it is, and of the merged one.

        The base is the model with its adapter switched off; for method=full, the model before its first step, in the
        dtype that it trains in. Virtual tokens stand before the tuned model's prompt. Null: not to be had.
        """
        s, tuner = self.session, self.session.parts.tuner
        if not s.ranks.alone and s.settled.strategy == "fsdp":
            s.console.say(
                "latency: not measured: each rank holds a part of the weights, and gathers them for each token"
            )
            return None
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
        with attention(s.work.model, "sdpa"), s.work.autocast(), s.parts.tuner.settled(s.work.model):
            return s.work.parallel.run(latency.milliseconds, s.work.model, s.parts.base.tokenizer(), prompt, tokens)

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
        with self.sparing("latency, merged"):
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
    def sparing(self, what: str, how: str = "measured") -> Iterator[None]:
        """No figure is worth the run: one that takes more memory than there is stays null."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.session.console.say(f"{what}: not {how}: out of memory: {str(error).splitlines()[0][:200]}")


def effective_rank(parts: assemble.Sketch) -> dict[str, Any] | None:
    """None of a method without a rank. rank: the job's; by method.rank_pattern a module may have another."""
    found = parts.tuner.effective_ranks(parts.model)
    if not found:
        return None
    ranks = list(found.values())
    return {
        "mean": sum(ranks) / len(ranks),
        "lowest": min(ranks),
        "highest": max(ranks),
        "rank": parts.tuner.options.rank,
        "by_module": {name: round(value, 4) for name, value in found.items()},
    }
