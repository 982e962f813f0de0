"""Which rows a step takes, on which rank, as batches: what follows from the job and a step's number alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from ftrun.data import batches as batching
from ftrun.data.load import Corpus
from ftrun.data.prefetch import prefetch
from ftrun.data.rows import Rows
from ftrun.job import Job
from ftrun.train.ranks import Ranks
from ftrun.values import Batch


def steps_of(job: Job, corpus: Corpus) -> int:
    """The optimiser steps of the whole run."""
    if job.steps is not None:
        return job.steps
    return max(1, batching.steps_in(job.epochs or 1.0, len(corpus.train), job.batch))


def micro_rows(job: Job, corpus: Corpus, micro_batch: int, step: int, rank: int = 0) -> list[list[int]]:
    """The rows of each micro-batch of a step that a rank takes: a function of the job and the step's number alone.

    Each rank has as many; where rows run out, the last are empty.
    """
    chosen = batching.step_rows(len(corpus.train), job.batch, step, job.seed, by_epoch=job.steps is None)
    lengths, packed = corpus.train.lengths, job.kernels == "fast"
    return batching.micro(chosen, micro_batch, rank, job.devices, lengths, packed)


def step_batches(job: Job, corpus: Corpus, micro_batch: int, pad_id: int, step: int, rank: int = 0) -> list[Batch]:
    """The micro-batches of one optimiser step that a rank takes, a stand-in for each that has no rows."""
    return [
        collated(job, corpus.train, part, pad_id) if part else stand_in(job, corpus.train, pad_id)
        for part in micro_rows(job, corpus, micro_batch, step, rank)
    ]


def collated(job: Job, rows: Rows, part: Sequence[int], pad_id: int) -> Batch:
    """Rows as the job's kernels take them."""
    return batching.collate(rows, part, packed=job.kernels == "fast", pad_id=pad_id)


def stand_in(job: Job, rows: Rows, pad_id: int) -> Batch:
    """A batch for a rank that has no rows left: the shortest row, which counts for nothing."""
    made = collated(job, rows, [int(rows.lengths.argmin())], pad_id)
    return dataclasses.replace(made, tokens=0, supervised=0, rows=())


def first_groups(job: Job, corpus: Corpus, micro_batch: int) -> list[list[int]]:
    """The micro-batches in which an epoch of whole batches first meets each row: each row is in one of them."""
    whole, steps = dataclasses.replace(job, steps=None), batching.steps_in(1, len(corpus.train), job.batch)
    return [part for step in range(steps) for part in micro_rows(whole, corpus, micro_batch, step) if part]


def prefetched(make: Callable[[int], list[Batch]], start: int, stop: int) -> Iterator[list[Batch]]:
    """The steps' micro-batches from `start` on, made ahead in a thread."""
    return prefetch(make(step) for step in range(start, stop))


def evaluation_batches(
    job: Job,
    corpus: Corpus,
    limit: int | None,
    micro_batch: int,
    pad_id: int,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> Sequence[Batch]:
    """The held-out rows as batches of `micro_batch` rows, in order; of several ranks each has as many, stand-ins
    among them."""
    indices = list(range(min(len(corpus.held_out), limit or len(corpus.held_out))))
    pieces = [indices[i : i + micro_batch] for i in range(0, len(indices), micro_batch)]
    missing = -len(pieces) % ranks.world
    made = [collated(job, corpus.held_out, p, pad_id) for p in pieces[ranks.rank :: ranks.world]]
    return made + ([stand_in(job, corpus.held_out, pad_id)] if ranks.rank >= ranks.world - missing else [])
