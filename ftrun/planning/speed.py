"""How long a step takes: its counted work at a device's rates. The rates come of a short measurement on the device at
hand (a few real steps of a few of the job's own layers), or, for a card that is not here, of what its maker says.
"""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch

from ftrun import assemble
from ftrun.job import Job
from ftrun.memory.cost import Cost
from ftrun.memory.device import Options
from ftrun.planning.settle import Worst
from ftrun.planning.twin import Twin
from ftrun.train.loop import accumulate, clip, update
from ftrun.values import Batch

_ROUNDS = 3  # timed steps of a sample, after one that warms up; the fastest counts
_PASSES = 4000  # of the fit: each is some microseconds
# shares of a card's figures that training reaches: products, attention, traffic; seconds to start an operation
_REACHED = {"products": 0.55, "attention": 0.35, "traffic": 0.75}
_CALL = 6e-6
_TYPICAL = (150.0, 900.0)  # TFLOPS and GB/s of a card of which nothing is known
_TF32 = 0.125  # float32 products over 16-bit ones, on cards that do not round them


@dataclass(frozen=True)
class Sample:
    """A step as it was counted, and the seconds that it took."""

    cost: Cost
    seconds: float


@dataclass(frozen=True)
class Speed:
    """Seconds of a unit of each kind of work. error: of a step left out of the fit, the median share; None: unknown.

    words: where the rates come from.
    """

    rates: tuple[float, ...]
    error: float | None
    words: str

    def seconds(self, cost: Cost) -> float:
        """The predicted seconds of that much work."""
        return sum(rate * amount for rate, amount in zip(self.rates, astuple(cost), strict=True))


def from_sheet(options: Options) -> Speed:
    """The rates of a card that is not here, from its maker's figures, or a typical card's where it has none."""
    tflops, bandwidth = options.tflops or _TYPICAL[0], options.bandwidth or _TYPICAL[1]
    product, traffic = 1 / (tflops * 1e12), 1 / (bandwidth * 1e9)
    rates = (
        product / _REACHED["products"],
        product / _REACHED["products"] / _TF32,
        product / _REACHED["attention"],
        traffic / _REACHED["traffic"],
        2.6 * traffic / _REACHED["traffic"],  # half a byte and its constants in, two bytes out
        _CALL,
    )
    whose = "its maker's figures" if options.tflops and options.bandwidth else "a typical card's: trust the order"
    return Speed(rates, None, f"{whose} ({tflops:g} TFLOPS, {bandwidth:g} GB/s), not measured")


def fitted(samples: Sequence[Sample]) -> Speed:
    """The rates that explain the samples best, none below zero, and the error on a sample that was left out."""
    errors = []
    for number, one in enumerate(samples):
        others = Speed(_fit([s for n, s in enumerate(samples) if n != number]), None, "")
        errors.append(abs(others.seconds(one.cost) / one.seconds - 1))
    words = (
        f"measured here, in {len(samples)} short steps of a few layers over lengths seen before (a CPU compiles "
        "kernels for each new one: the first epoch is slower, the order of the choices the same)"
    )
    return Speed(_fit(samples), statistics.median(errors), words)


def _fit(samples: Sequence[Sample]) -> tuple[float, ...]:
    """Least squares of the relative errors under θ ≥ 0, by coordinate descent."""
    rows = torch.tensor([[a / s.seconds for a in astuple(s.cost)] for s in samples], dtype=torch.float64)
    scale = rows.amax(0).clamp(min=1e-300)
    matrix = rows / scale
    gram, aim = (matrix.T @ matrix).tolist(), matrix.sum(0).tolist()
    theta = [0.0] * len(aim)  # plain numbers: six of them are too few for tensors
    for _ in range(_PASSES):
        for k, row in enumerate(gram):
            if row[k] > 0:
                theta[k] = max(0.0, theta[k] + (aim[k] - sum(map(operator.mul, row, theta))) / row[k])
    return tuple(map(operator.truediv, theta, scale.tolist()))


def measure(
    jobs: Sequence[Job], sketch: Callable[[Job], assemble.Sketch], worst: Worst, device: torch.device
) -> list[Sample]:
    """Real steps of few of each job's layers, with random weights, on small micro-batches and larger ones.

    With recomputation and without: so that what a layer costs, and what each kind of work does, can be told apart.
    """
    found = []
    for job in jobs:
        parts = sketch(job)
        for rows, layers, recomputed in ((1, 2, 2), (1, 4, 0), (2, 3, 3), (4, 2, 0)):
            batch = worst(rows)[0][1][0]
            found.append(_sample(job, parts, device, batch, layers, recomputed))
    return found


def _sample(
    job: Job, parts: assemble.Sketch, device: torch.device, batch: Batch, layers: int, recomputed: int
) -> Sample:
    twin = Twin(job, parts, counts=True)
    kept = twin.trained_layers()[:layers] or list(range(min(layers, twin.depth)))
    counted = twin.alone(kept, [batch], recomputed)
    with Twin(job, parts).real(kept, recomputed, device) as work:
        work.model.train()
        seconds = []
        for _ in range(1 + _ROUNDS):
            started = time.perf_counter()
            accumulate(work, [batch])
            clip(work)
            update(work)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return Sample(counted, min(seconds[1:]))
