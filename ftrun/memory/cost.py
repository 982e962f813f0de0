"""The work of a step, counted from its operations: what takes time, in units that a device has rates for.

Counted on fake tensors beside the memory. No time is guessed here: ftrun/planning/speed.py measures the rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

_PRODUCTS: tuple[str, ...] = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "grouped_mm", "grouped_outer", "_grouped_mm")
_FREE: tuple[str, ...] = (
    "view",
    "t",
    "transpose",
    "permute",
    "detach",
    "expand",
    "slice",
    "split",
    "split_with_sizes",
    "unsqueeze",
)
_FREE += ("squeeze", "select", "as_strided", "alias", "reshape", "_unsafe_view", "empty", "empty_like", "unbind")
_DENSE = ("dequantize_4bit", "dequantise_4bit", "dequantise_int8")


@dataclass(frozen=True)
class Cost:
    """products16, products32: floating-point operations of matrix products, by dtype. attention: those of attention.
    traffic: bytes that other operations read and write. dense: weights made dense from their quantised form.
    calls: operations started.
    """

    products16: float = 0
    products32: float = 0
    attention: float = 0
    traffic: float = 0
    dense: float = 0
    calls: float = 0

    def plus(self, other: Cost, times: float = 1) -> Cost:
        """This, and `times` the other."""
        return Cost(*(a + times * b for a, b in zip(astuple(self), astuple(other), strict=True)))


KINDS = tuple(field.name for field in fields(Cost))


def cost_of(func: Any, args: Any, out: Any) -> Cost:
    """The work of one operation on these tensors."""
    name = func.overloadpacket.__name__
    if name in _FREE:
        return Cost()
    if name in _PRODUCTS:
        return _product(args, out)
    if name == "linear":
        return Cost(products16=2.0 * out.numel() * sum(x.shape[1] for x in args[0]), calls=1)
    if name in ("attention", "attention_backward"):
        return Cost(attention=_by_rows(name, args), calls=1)
    if "scaled_dot_product" in name:
        return Cost(attention=_attention(name, args), calls=1)
    if name in _DENSE:
        return Cost(dense=sum(t.numel() for t in _tensors(out)), calls=1)
    moved = sum(t.numel() * t.element_size() for t in (*_tensors(args), *_tensors(out)))
    return Cost(traffic=moved, calls=1)


def _product(args: Any, out: Any) -> Cost:
    left, right = [t for t in _tensors(args) if t.dim() >= 2][-2:]
    # of two factors (…, n, k) and (…, k, m): n · m is what comes out, k what is summed over
    summed = left.shape[-1] if left.shape[-1] == right.shape[-2] else left.shape[0]
    count = 2.0 * summed * math.prod(next(iter(_tensors(out))).shape)
    if right.dim() == 3 and left.dim() == 2:  # grouped by experts: each row meets one of the matrices
        count = 2.0 * math.prod(left.shape) * right.shape[-1]
    return Cost(products32=count, calls=1) if left.dtype == torch.float32 else Cost(products16=count, calls=1)


def _attention(name: str, args: Any) -> float:
    """Two products of (T, D) by (D, T) each head, causal: half of it; backward has five."""
    backward = "backward" in name
    query, key = [t for t in _tensors(args) if t.dim() == 4][1 if backward else 0 :][:2]
    batch, heads, length, width = query.shape
    return (5 if backward else 2) * batch * heads * length * key.shape[2] * width


def _by_rows(name: str, args: Any) -> float:
    """As `_attention`, for our own operators: each row against itself."""
    back = name.endswith("backward")
    query, lengths = (args[1], args[6]) if back else (args[0], args[3])
    return (5 if back else 2) * query.shape[1] * query.shape[3] * float(sum(n * n for n in lengths))


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
