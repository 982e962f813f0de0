"""One run from its preparation to its result: the parts of `ftrun train`, in the order in which they happen."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ftrun import assemble, stepping
from ftrun.early import check_devices
from ftrun.errors import DoesNotFit, RunFailed, UserError, is_out_of_memory
from ftrun.evals.answer import answer, asked, prompt_ids
from ftrun.job import Job
from ftrun.kernels import compiled
from ftrun.memory.device import Device
from ftrun.memory.host import change_pages, few_arenas, keep_pages
from ftrun.memory.measure import Meter
from ftrun.metrics import jsonl
from ftrun.metrics.console import Console
from ftrun.metrics.sink import Sink
from ftrun.models import provenance
from ftrun.models.forward import attention
from ftrun.planning.keeping import FOLDER
from ftrun.planning.settle import Settled
from ftrun.runs import Run, read_json, write_json
from ftrun.tasks.judging import Judge
from ftrun.tasks.keep import Keeper
from ftrun.tasks.outcome import summary
from ftrun.tasks.peak import Peak
from ftrun.tasks.room import Evaluations, copies, room_of
from ftrun.tasks.shared import Shared, Watch
from ftrun.train.checkpoint import Checkpoint
from ftrun.train.generators import seed_rank
from ftrun.train.interrupt import stop_requests
from ftrun.train.kept import InMemory, KeptLoss, KeptRows, OnDisk
from ftrun.train.loop import Progress, train
from ftrun.train.ranks import Ranks
from ftrun.values import Batch, EvalRecord, StepRecord


class Session:
    """A job at work. `prepare` touches no folder but the cache; `train` writes the run's."""

    def __init__(
        self,
        job: Job,
        cache: Path,
        console: Console,
        shared: Shared | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.job, self.cache, self.console, self.ranks = job, cache, console, Ranks()
        self.shared, self.watch = shared or Shared(), watch or Watch()
        self.progress = Progress()
        self.began = False  # whether a step was trained: what there is must then stay
        self.sinks: list[Sink] = [console]
        self.evals: dict[str, dict[str, Any]] = {}
        self.peak = Peak(self)
        self.kept: KeptRows | None = None
        self.judge = Judge(self)

    def prepare(self, out: Path) -> None:
        """Everything that can be refused: the model's names, the data, the plan. No weight is read."""
        self.open(out)
        self.settle(out)

    def open(self, out: Path) -> None:
        """The model's names and the data."""
        job, say = self.job, self.console.say
        self.options = job.eval.typed()
        self.tracker = job.log.load().sink(job.log.typed(), out.name, say)
        self.device = self._device()
        if self.device.type == "cpu":
            few_arenas()
            if job.kernels == "fast" and (why := compiled.trouble()):
                say(f"warning: kernels=fast: none could be compiled for this CPU ({why}); the models' own code runs")
        self.parts = self.shared.sketch(job, self.cache, say)
        self.corpus = self.shared.rows(job, self.parts, self.cache, say)
        for note in job.optim.typed().notes(self.device.type):
            say(note)
        tokenizer = self.parts.base.tokenizer()
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.total = stepping.steps_of(job, self.corpus)

    def settle(self, out: Path) -> None:
        """The plan, and what `auto` comes to. Raises DoesNotFit."""
        job, say = self.job, self.console.say
        prepared = self.shared.prepared(job, self.parts, self.corpus, self.device, self.pad_id, self.total, out)
        self.settled = prepared.settled
        for note in prepared.notes:
            say(note)
        if self.device.type == "cpu":
            keep_pages() if 2 * self.settled.plan.needed_bytes < self.device.free_bytes else change_pages()
        if not self.settled.plan.fits and job.refuse:
            raise DoesNotFit(f"{prepared.refusal()}. refuse=false starts it as it is")

    def share_settled(self) -> None:
        """What the first rank has settled, for all."""
        found = self.ranks.told(self.settled.as_dict() if self.ranks.first else None)
        if not self.ranks.first:
            self.settled = Settled.read(found)

    def _device(self) -> Device:
        device = self.shared.device(self.job)
        if not device.present:
            size = f"{device.total_bytes / 1e9:.0f} GB"
            raise UserError(f"device={self.job.device.choice}: {device.name} with {size} is not on this machine")
        check_devices(self.job)
        return device

    def train(self, run: Run) -> dict[str, Any]:
        """Weights, evaluation, the loop, evaluation, the adapter; returns what result.json holds."""
        torch_device = assemble.torch_device(self.device)
        self.keeper = Keeper(run, self.job, self.parts, self.corpus, self.console.say)
        found = self.keeper.found(self.job.resume)
        self._start(run, found)
        torch.manual_seed(self.job.seed)
        place = assemble.filled_on(torch_device, self.settled.strategy)
        assemble.furnish(
            self.job, self.parts, place, self.cache, self.console.say, self.settled.recomputed, self.shared.shelf
        )
        if found is not None:
            self.keeper.load_trained(found.trained)
        parallel = assemble.shared(self.job, self.parts, self.ranks, self.settled.strategy, self.device.type)
        self.work = assemble.work(self.job, self.parts, torch_device, self.total, parallel=parallel, ranks=self.ranks)
        if not self.ranks.alone:  # the weights are drawn, alike on all of them; what training draws is not
            seed_rank(self.job.seed, 0, self.ranks)
        if found is not None:
            self.progress = found.progress
            self.keeper.restore(found, self.work)
            self.console.say(f"resumed after step {self.progress.step}")
        if self.ranks.first:
            run.record(self.job.as_dict(), [f"{what} sha256 {digest}" for what, digest in self.keeper.belongs.items()])
        self.began = found is not None
        del found
        self._equip()
        self.peak.begin(self.progress.step)
        self._keep_prefix(run)
        self.judge.before()
        self._evaluate_ends("before", run)
        with stop_requests(self.console.say) as asked:
            self.work.stop = lambda: asked() or self.watch.halts(self.progress.step)
            self.work.overdue = asked.overdue
            if self.ranks.alone:  # of several ranks none may leave a step alone: they ask one another
                self.work.abandonable = asked.abandonable
            for record in train(self.work, self.progress):
                self.began = True
                self._record(record)
        self._end(run)
        if self.kept is not None:
            self.kept.store.close()
        if self.ranks.first:
            shutil.rmtree(run.path / FOLDER, ignore_errors=True)
        self.judge.after()
        if self.ranks.first:
            self.lines.settle()
        return {**self.summary(), "status": "finished"}

    def close(self, run: Run, outcome: dict[str, Any] | None) -> None:
        """result.json, then the sinks, whatever happened."""
        try:
            if hasattr(self, "keeper"):
                self.keeper.finish()
            if outcome is not None and self.ranks.first:
                write_json(run.path / "result.json", outcome)
        finally:
            for sink in self.sinks:
                sink.close(outcome)

    # --- the parts ---

    def _start(self, run: Run, found: Checkpoint | None) -> None:
        self.console.total = self.total
        if not self.ranks.first:
            return
        write_json(run.path / "plan.json", self.settled.plan.as_dict())
        self.lines = jsonl.JsonLines(say=self.console.say)
        if found is not None:
            after, left = found.progress.step, found.progress.unevaluated
            self.lines = jsonl.JsonLines(after, left or after >= self.total, self.console.say, found.files)
        self.keeper.records = self.lines.content
        self.sinks.append(self.lines)
        if self.tracker is not None:
            self.sinks.append(self.tracker)
        for sink in self.sinks:
            sink.start(self.job.as_dict(), run.path)
        plan = self.settled.plan
        self.console.say(
            f"plan    {plan.peak_bytes / 1e9:.2f} GB at the peak of {self.device.free_bytes / 1e9:.1f} GB free; "
            f"{plan.trainable_params:,} of {plan.total_params:,} parameters train; {self.total} steps of "
            f"{self.job.batch} rows, {self.settled.micro_batch} at once, {self.settled.recomputed} layers recomputed"
        )

    def _equip(self) -> None:
        """What the loop needs of this run: batches, memory, evaluations, checkpoints."""
        work, job, options = self.work, self.job, self.options
        meter = Meter(self.device.type)
        work.memory, work.reset_peak = meter.current, meter.reset_peak
        self.peak.figures["measures"] = {
            "measured_peak_bytes": "bytes that torch's allocator held at most in the planned step, by its own events",
            "process_peak_bytes": meter.measures,
        }

        room = room_of(self)
        # a rank that ran out of memory has left the others waiting within a collective, of which none can be taken back
        work.room = room if self.ranks.alone else None

        def batches(start: int) -> Iterator[list[Batch]]:
            rows = room.micro_batch  # as it is now: a thread makes them

            def make(step: int) -> list[Batch]:
                made = stepping.step_batches(job, self.corpus, rows, self.pad_id, step, self.ranks.rank)
                if (kept := self.kept) is not None:
                    kept.ahead(made)
                return made

            return stepping.prefetched(make, start, self.total)

        work.batches, work.watch, work.skips, work.say = batches, self.peak.watch, job.skip_nonfinite, self.console.say
        work.where = self.corpus.train.where
        work.save_steps, work.save_seconds = job.save_interval()
        work.save = lambda progress: self.keeper.save(work, progress)
        if copies(self):
            work.save_aside = lambda progress: self.keeper.save_aside(work, progress)
        if options.evaluates and len(self.corpus.held_out):
            evaluations = Evaluations(self)
            work.evaluate = lambda step: _sound(evaluations.at(step))
            work.evaluate_every, work.patience = options.every, options.patience
            work.rungs = self.watch.rungs
            if options.keep_best:
                work.save_best = lambda progress: self.keeper.save(work, progress, "best")

    def keep_no_more(self) -> None:
        """Where memory is short the store is let go: its groups of rows were those of the larger micro-batch."""
        if self.kept is None:
            return
        self.work.loss = self.whole_loss
        self.kept.store.close()
        self.kept = None
        self.console.say("keep_prefix: no longer: memory was short")

    def _keep_prefix(self, run: Run) -> None:
        """Training takes what the frozen layers give its rows from a store; evaluations run the whole model."""
        self.whole_loss, where = self.work.loss, self.settled.kept.where
        if where == "none" or self.progress.recoveries:
            return
        settled, job = self.settled, self.job
        facts = {**self.keeper.belongs, "quantisation": self.parts.quantiser.scheme(), "device": self.device.type}
        facts |= {k: getattr(job, k) for k in ("seed", "batch", "kernels", "seq_len")} | {"torch": torch.__version__}
        facts |= {"rows at once": settled.micro_batch, "layers": settled.plan.without_graph}
        store = InMemory() if where == "memory" else OnDisk(run.path / FOLDER, facts)
        try:
            self.kept = assemble.kept_rows(
                job, self.parts, self.corpus, settled.micro_batch, self.pad_id, store, self.work, self.console.say
            )
        except ValueError as error:
            self.console.say(f"warning: keep_prefix: nothing is kept: {error}")
            return
        self.work.loss = KeptLoss(self.work.loss, self.kept)

    def _loss(self, batch: Batch) -> torch.Tensor:
        with self.work.autocast():
            return self.work.parallel.run(self.whole_loss, batch.to(self.work.device))

    def _evaluate_ends(self, when: str, run: Run) -> None:
        """The evaluation before or after training, with one prompt answered."""
        if self.work.evaluate is None or (when == "before" and not self.options.before):
            return
        if when == "before" and self.progress.step:
            self.evals["before"] = next((r for r in jsonl.read(run.path / "evals.jsonl") if r["step"] == 0), {})
            return
        if when == "before" and self._evaluated_before():
            return
        record = self.work.evaluate(self.progress.step)
        best = self.progress.best_loss
        better = when == "after" and self.work.save_best and best is not None and best < record.loss
        if better and self.keeper.load_best():
            self.console.say(f"the best weights are those of step {self.progress.best_step}: they are handed over")
            record = self.work.evaluate(self.progress.step)
        said: dict[str, Any] = {}
        with self.judge.sparing("eval.prompt", "answered"):
            said = self._answer()
        self._note_evaluation(when, EvalRecord(**{**asdict(record), "extra": said}))
        whole = bool(said) or not self.options.max_new_tokens
        if when == "before" and whole and (kept := self._base_figures()):
            try:
                write_json(kept, asdict(record) | {"extra": said})
            except OSError as error:
                why = error.strerror or error
                self.console.say(f"warning: the base's figures are not kept in {kept.parent}: {why}")

    def _end(self, run: Run) -> None:
        """The evaluation after training, and what was learnt handed over, which no want of memory there may cost."""
        try:
            self._evaluate_ends("after", run)
        except (RuntimeError, MemoryError) as error:
            if self.ranks.alone and is_out_of_memory(error):
                self.keeper.hand_over(self.provenance())
            raise
        self.keeper.hand_over(self.provenance(), self.ranks)

    def _note_evaluation(self, when: str, record: EvalRecord) -> None:
        self.evals[when] = {**asdict(record), **record.extra}
        for sink in self.sinks:
            sink.evaluation(record)

    def _evaluated_before(self) -> bool:
        """Whether an earlier run has evaluated this very base on these very rows; its figures are then taken."""
        path = self._base_figures()
        found = _kept_figures(path) if path and path.is_file() else None
        if found is None:
            return False
        self._note_evaluation("before", found)
        self.console.say("        (the base's figures on these rows, from the cache)")
        return True

    def _base_figures(self) -> Path | None:
        """Where the untuned base's figures are kept; None where step 0 is not the base itself."""
        tuner, held_out = self.parts.tuner, self.corpus.held_out
        if tuner.prefix or getattr(tuner.options, "from_", None):
            return None
        rows = [[*map(int, held_out.ids(i)), -1, *map(int, held_out.learn(i))] for i in range(len(held_out))]
        facts = [self.parts.base.hash(), self.parts.quantiser.scheme(), self.job.model.options.dtype, self.job.kernels]
        facts += [self.job.model.options.new_tokens, asdict(self.options), self.device.type, rows]
        facts += [torch.__version__, importlib.metadata.version("ftrun")]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        return self.cache / "evals" / f"{digest[:32]}.json"

    def _answer(self) -> dict[str, Any]:
        """The user's prompt, or the first held-out row's, answered by the model as it is now."""
        options, tokenizer = self.options, self.parts.base.tokenizer()
        if not options.max_new_tokens:
            return {}
        prefix = list(self.corpus.held_out.prefix_ids)
        ids = prompt_ids(options.prompt, tokenizer, self.corpus.held_out)
        with attention(self.work.model, "sdpa"), self.work.autocast():
            text = self.work.parallel.run(answer, self.work.model, tokenizer, [*prefix, *ids], options.max_new_tokens)
        return {"prompt": options.prompt or asked(ids, tokenizer), "answer": text}

    def _record(self, record: StepRecord | EvalRecord) -> None:
        self.keeper.tell()
        for sink in self.sinks:
            if isinstance(record, StepRecord):
                sink.step(record)
            else:
                sink.evaluation(record)
        if isinstance(record, EvalRecord):
            self.watch.evaluated(record)

    def provenance(self) -> dict[str, Any]:
        """What an adapter belongs to: the base's hash, how it was stored, and the versions at work."""
        return {
            **provenance.record(self.parts.base, self.parts.quantiser.scheme()),
            "method": self.job.method.choice,
            "versions": provenance.versions(),
            **({"drifts": self.parts.drifts} if self.parts.drifts else {}),
        }

    def summary(self) -> dict[str, Any]:
        """result.json but for its status."""
        return summary(self)


def _kept_figures(path: Path) -> EvalRecord | None:
    """An evaluation that is kept; None where the file is damaged or of another version: it is made again."""
    try:
        found = EvalRecord(**(read_json(path) or {}))
    except (UserError, TypeError):
        return None
    numbers = (found.step, found.loss, found.perplexity, found.tokens, found.seconds)
    return found if all(isinstance(n, int | float) for n in numbers) and isinstance(found.extra, dict) else None


def _sound(record: EvalRecord) -> EvalRecord:
    """Raises RunFailed on a held-out loss that is no number."""
    if math.isfinite(record.loss):
        return record
    cause = "a lower lr may help" if record.step else "the base's own weights give no number: are they damaged?"
    raise RunFailed(f"held-out at step {record.step}: loss {record.loss}: not finite; {cause}")
