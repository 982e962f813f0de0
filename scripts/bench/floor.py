"""The floor of a job: the floating-point operations that it must do, and the rate at which this machine multiplies.

Counted from the model's anatomy, not from what any code does: a frozen weight takes part in the forward pass and in
the gradient of its input where something below it trains (2 operations a parameter each); LoRA's two factors take
three such passes; the head sees supervised tokens alone; attention is causal within each row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_STAGES = {"q": 0, "k": 0, "v": 0, "qkv": 0, "o": 1, "gate": 2, "up": 2, "gate_up": 2, "down": 3}
_TRIES, _CHUNK = 5, 512  # of which the best counts; tokens of logits at once


@dataclass(frozen=True)
class Weight:
    """A linear layer of the decoder. rank: of its update, 0 where it has none."""

    layer: int
    role: str
    inputs: int
    outputs: int
    rank: int = 0


@dataclass(frozen=True)
class Shape:
    """What the count needs of a job. heads: heads × their width. recomputed: so many layers, the first ones."""

    weights: tuple[Weight, ...]
    depth: int
    heads: int
    width: int
    vocabulary: int
    recomputed: int = 0
    dora: bool = False

    @property
    def lowest(self) -> int:
        """The lowest layer in which something trains."""
        return min(w.layer for w in self.weights if w.rank)


def operations(shape: Shape, lengths: Sequence[int], supervised: int) -> dict[str, float]:
    """Floating-point operations of a step over rows of these lengths, by part."""
    tokens, squares = sum(lengths), float(sum(n * n for n in lengths))
    frozen = updates = 0.0
    for weight in shape.weights:
        size, factors = weight.inputs * weight.outputs, weight.rank * (weight.inputs + weight.outputs)
        passes = 1 + (weight.layer < shape.recomputed)
        below = _trains_below(weight, shape)
        frozen += 2 * size * (passes + below)
        # backward: both factors' gradients, the middle's, and the input's where it is needed
        backward = 2 * factors + 2 * weight.rank * (weight.outputs + below * weight.inputs)
        updates += 2 * factors * passes + (backward if weight.rank else 0)
    norms = sum(2.0 * w.rank * w.inputs * w.outputs for w in shape.weights) if shape.dora else 0.0
    attended = shape.depth * 2 + (shape.depth - shape.lowest) * 4 + shape.recomputed * 2
    return {
        "frozen weights": frozen * tokens,
        "updates": updates * tokens + norms,
        "head": 4.0 * shape.vocabulary * shape.width * supervised,
        "attention": attended * squares * shape.heads,
    }


def _trains_below(weight: Weight, shape: Shape) -> bool:
    """Whether something trains that this weight's input depends on."""
    stage = _STAGES.get(weight.role, 1)
    return any(
        w.layer < weight.layer or (w.layer == weight.layer and _STAGES.get(w.role, 1) < stage)
        for w in shape.weights
        if w.rank
    )


def measured_rate(shape: Shape, tokens: int, supervised: int) -> float:
    """bf16 operations a second in matrix products of the job's own shapes, warm, each at its best, as often as they
    come in a step of so many tokens at once.
    """
    rows = max(1, min(tokens, 4096))
    kinds: dict[tuple[int, int, int], float] = {}
    for weight in shape.weights:
        key = (rows, weight.outputs, weight.inputs)
        kinds[key] = kinds.get(key, 0.0) + tokens / rows
    kinds[_CHUNK, shape.vocabulary, shape.width] = supervised / _CHUNK
    work = sum(4.0 * n * out * into * times for (n, out, into), times in kinds.items())
    return work / sum(_seconds(*key) * times for key, times in kinds.items())


def _seconds(rows: int, outputs: int, inputs: int) -> float:
    """Of a weight's product with its input and of the one that gives its input's gradient."""
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    into, out = torch.randn(rows, inputs, dtype=torch.bfloat16), torch.randn(rows, outputs, dtype=torch.bfloat16)
    return _best(lambda: torch.nn.functional.linear(into, weight)) + _best(lambda: out @ weight)


def _best(act: Callable[[], object]) -> float:
    act()
    taken = []
    with torch.no_grad():
        for _ in range(_TRIES):
            started = time.perf_counter()
            act()
            taken.append(time.perf_counter() - started)
    return min(taken)
