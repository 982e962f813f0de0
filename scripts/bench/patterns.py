"""What an operation that the profiler saw belongs to, by its name and the names of what it ran within.

A new kernel needs no line here where its name says what it does; else add it to KINDS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LOSS, OPTIMISER, LAYER = "bench::loss", "bench::optimiser", "bench::layer"  # marks that breakdown.py sets
REST, OUTSIDE = "the rest", "outside operations"  # the latter: Python between them

# the first kind that an operation, or one around it, matches
KINDS: dict[str, tuple[str, ...]] = {
    "loss": (LOSS, r"FrozenHeadLoss", r"ftrun::.*(loss|cross_entropy)", r"CrossEntropy|nll_loss"),
    "optimiser": (OPTIMISER, r"Optimizer\.(step|zero_grad)"),
    "attention": (r"scaled_dot_product|ScaledDotProduct", r"ftrun::.*attention", r"flash_attention|AttentionBackward"),
    "dequantisation": (r"dequanti[sz]e", r"bitsandbytes::"),
    "matrix products": (
        r"^aten::(mm|addmm|addmm_|bmm|baddbmm|baddbmm_|matmul|linear|addmv|mv)$",
        r"mkldnn|onednn|grouped_mm|::gemm",
        r"ftrun::.*(linear|lora|matmul|product|_mm\b)",
    ),
}
ORDER = ("matrix products", "attention", "loss", "dequantisation", "optimiser", REST, OUTSIDE)
_COMPILED = {kind: re.compile("|".join(patterns)) for kind, patterns in KINDS.items()}


def classify(names: Iterable[str]) -> str:
    """The kind of an operation. names: its own, then those around it, outwards.

    A layer that is computed again runs within the backward pass of whatever needed it first: what lies around LAYER
    does not count.
    """
    within = []
    for name in names:
        if name == LAYER:
            break
        within.append(name)
    for kind, pattern in _COMPILED.items():
        if any(pattern.search(name) for name in within):
            return kind
    return REST
