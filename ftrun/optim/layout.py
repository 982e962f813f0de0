"""An optimiser's state in another layout: parameters whole, gathered into flat ones, or cut over several ranks.

A moment belongs to its weight, wherever that lies. Codes of 8 bits move as they are where their blocks stay whole;
where a block is cut they are decoded and quantised anew, which is not exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ftrun.optim.gather import BLOCK, filled, size_of
from ftrun.optim.state import of_rank

_MAPS = {"1": "dynamic", "2": "udynamic"}  # bitsandbytes' map of a moment's codes, by the last letter of its key
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Span:
    """`size` elements of a trained parameter, flattened, from `start` on: they lie at `at` of an optimiser's tensor."""

    parameter: int
    start: int
    size: int
    at: int = 0


@dataclass(frozen=True)
class Layout:
    """How an optimiser holds what trains: how many tensors are in each group, their shapes, and what lies in them."""

    groups: list[int]
    shapes: list[list[int]]
    spans: list[list[Span]]

    @classmethod
    def of(cls, groups: Iterable[Mapping[str, Any]], numbers: Mapping[torch.Tensor, int]) -> Layout:
        """That of groups whose "params" are buckets (optim/gather.py); numbers: of each trained parameter."""
        made = cls([], [], [])
        for group in groups:
            made.groups.append(len(group["params"]))
            for bucket in group["params"]:
                starts = [sum(map(filled, bucket[:n])) for n in range(len(bucket))]
                made.shapes.append([size_of(bucket)] if len(bucket) > 1 else list(bucket[0].shape))
                made.spans.append([Span(numbers[p], 0, p.numel(), at) for p, at in zip(bucket, starts, strict=True)])
        return made

    def part(self, rank: int, world: int) -> Layout:
        """A rank's part, where each tensor is one parameter: so many of its rows, as torch.chunk has it."""
        shapes, spans = [], []
        for (rows, *rest), (whole,) in zip(self.shapes, self.spans, strict=True):
            share = -(-rows // world)
            first, own = min(rank * share, rows), max(0, min(share, rows - rank * share))
            shapes.append([own, *rest])
            spans.append([dataclasses.replace(whole, start=first * math.prod(rest), size=own * math.prod(rest))])
        return Layout(self.groups, shapes, spans)


@dataclass(frozen=True)
class _Moment:
    """Consecutive elements of a parameter's moment, from `start` on: (n,); where there are scales, codes of 8 bits."""

    start: int
    values: torch.Tensor
    scales: torch.Tensor | None = None
    codes: torch.Tensor | None = None  # what each of the 256 stands for

    def cut(self, start: int, size: int) -> _Moment:
        """Some of them. start: counted from the first."""
        values = self.values[start : start + size]
        if self.scales is None:
            return _Moment(start, values)
        if start % BLOCK:
            return _Moment(start, self.decoded()[start : start + size])
        return _Moment(start, values, self.scales[start // BLOCK : -(-(start + size) // BLOCK)], self.codes)

    def decoded(self) -> torch.Tensor:
        if self.scales is None:
            return self.values
        assert self.codes is not None
        return self.codes[self.values.long()] * self.scales.repeat_interleave(BLOCK)[: self.values.numel()]

    @classmethod
    def coded(cls, values: torch.Tensor, codes: torch.Tensor) -> _Moment:
        """Values (n,), quantised: a scale for each block, the nearest code for each value."""
        blocks = torch.nn.functional.pad(values.float(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(1)
        shares = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).view(-1)[: values.numel()]
        return cls(0, torch.bucketize(shares, (codes[1:] + codes[:-1]) / 2).to(torch.uint8), scales, codes)


def fitted(
    tensors: Tensors, meta: Mapping[str, Any], own: Layout, known: Sequence[Layout], optimiser: torch.optim.Optimizer
) -> tuple[Tensors, Mapping[str, Any], bool]:
    """(A saved state as `optimiser`, whose layout is `own`, has it; what goes with it; whether the move is exact).

    known: layouts that it may have been saved in; of parts, those of the last one. What was saved in none of them is
    returned as it is. Raises ValueError where a part is of other weights, or is missing.
    """
    saved: list[tuple[Tensors, Mapping[str, Any], Layout]]
    if "ranks" in meta:
        world = len(meta["ranks"])
        saved = [(of_rank(tensors, r), each, known[-1].part(r, world)) for r, each in enumerate(meta["ranks"])]
    else:
        facts = {"groups": meta["groups"], "shapes": meta["shapes"]}
        saved = [(tensors, meta, k) for k in known if facts == {"groups": k.groups, "shapes": k.shapes}][:1]
    for found, its, layout in saved:
        if its["shapes"] != layout.shapes or its["groups"] != layout.groups:
            raise ValueError(f"the saved optimiser state is not of {len(saved)} devices' parts of this job's weights")
        if layout == own:
            return found, its, True
    return (*_Move(saved).to(own, optimiser),) if saved else (tensors, meta, True)


class _Move:
    """The moments of each parameter, whole, and its numbers (counted steps)."""

    def __init__(self, saved: Sequence[tuple[Tensors, Mapping[str, Any], Layout]]) -> None:
        parts: dict[int, dict[str, list[_Moment]]] = {}
        self.numbers: dict[int, dict[str, Any]] = {}
        self.exact = True
        for tensors, meta, layout in saved:
            for index, entry in meta["state"].items():
                values = {k: tensors[v["tensor"]] if "tensor" in v else v["value"] for k, v in entry.items()}
                for span in layout.spans[int(index)]:
                    for key, moment in _moments(values, layout.shapes[int(index)], span):
                        parts.setdefault(span.parameter, {}).setdefault(key, []).append(moment)
                    self.numbers[span.parameter] = {k: v for k, v in values.items() if _is_number(v)}
        self.moments = {p: {k: self._whole(found) for k, found in by.items()} for p, by in parts.items()}

    def _whole(self, parts: list[_Moment]) -> _Moment:
        parts = sorted((p for p in parts if p.values.numel()), key=lambda p: p.start)
        ends = [0, *(p.start + p.values.numel() for p in parts)]
        if [p.start for p in parts] != ends[:-1]:
            raise ValueError("a part of the optimiser's state is missing")
        coded = [p for p in parts if p.scales is not None]
        if len(coded) == len(parts) and not any(p.start % BLOCK for p in parts):
            scales = torch.cat([p.scales for p in parts if p.scales is not None])
            return _Moment(0, torch.cat([p.values for p in parts]), scales, parts[0].codes)
        self.exact &= not coded
        return _Moment(0, torch.cat([p.decoded() for p in parts]))

    def to(self, own: Layout, optimiser: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any], bool]:
        """What `state.flatten` would give of an optimiser of this layout; whether every moment is what was saved."""
        tensors: dict[str, torch.Tensor] = {}
        state: dict[str, dict[str, Any]] = {}
        for index, eight in enumerate(_in_8_bits(optimiser)):
            there = [s for s in own.spans[index] if s.parameter in self.moments]
            if not there:
                continue
            made = {k: v for s in there for k, v in self.numbers[s.parameter].items()}
            for key in self.moments[there[0].parameter]:
                held = [(s, self.moments[s.parameter][key].cut(s.start, s.size)) for s in there]
                made |= self._tensor(key, own.shapes[index], held, _codes(optimiser, key) if eight else None)
            state[str(index)] = {
                k: {"tensor": f"{index}.{k}"} if _is_tensor(v) else {"value": v} for k, v in made.items()
            }
            tensors |= {f"{index}.{k}": v for k, v in made.items() if _is_tensor(v)}
        return tensors, {"groups": own.groups, "shapes": own.shapes, "state": state}, self.exact

    def _tensor(
        self, key: str, shape: list[int], held: Sequence[tuple[Span, _Moment]], codes: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """A moment of an optimiser's tensor: in `codes`, with its scales, or (None) as it is."""
        size = math.prod(shape)
        if codes is None:
            values = torch.zeros(size, dtype=held[0][1].decoded().dtype)
            for span, moment in held:
                self.exact &= moment.scales is None
                values[span.at : span.at + span.size] = moment.decoded()
            return {key: values.view(shape)}
        values = torch.full((size,), int(codes.abs().argmin()), dtype=torch.uint8)
        scales = torch.zeros(-(-size // BLOCK))
        for span, moment in held:
            self.exact &= moment.scales is not None
            found = moment if moment.scales is not None else _Moment.coded(moment.values, codes)
            assert found.scales is not None
            values[span.at : span.at + span.size] = found.values
            scales[span.at // BLOCK : span.at // BLOCK + found.scales.numel()] = found.scales
        return {key: values.view(shape), f"absmax{key[-1]}": scales, f"qmap{key[-1]}": codes}


def _moments(values: Mapping[str, Any], shape: list[int], span: Span) -> Iterator[tuple[str, _Moment]]:
    """Of a state in one tensor's shape, each moment of a span."""
    for key, value in values.items():
        if not _is_tensor(value) or not value.dim() or list(value.shape) != shape or key.startswith(("absmax", "qmap")):
            continue
        coded = value.dtype == torch.uint8
        whole = _Moment(0, value.reshape(-1), *((values[f"{n}{key[-1]}"] for n in ("absmax", "qmap")) if coded else ()))
        yield key, dataclasses.replace(whole.cut(span.at, span.size), start=span.start)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_number(value: Any) -> bool:
    return not _is_tensor(value) or not value.dim()


def _in_8_bits(optimiser: Any) -> Iterator[bool]:
    """Of each tensor that an optimiser holds: whether it makes its moments in 8 bits."""
    for g, group in enumerate(optimiser.param_groups):
        for p, parameter in enumerate(group["params"]):
            config = optimiser.get_config(g, p, group) if hasattr(optimiser, "get_config") else {"optim_bits": 32}
            yield config["optim_bits"] == 8 and parameter.numel() >= config["min_8bit_size"]


def _codes(optimiser: Any, key: str) -> torch.Tensor:
    if not optimiser.name2qmap:
        optimiser.fill_qmap()
    found: torch.Tensor = optimiser.name2qmap[_MAPS[key[-1]]].cpu()
    return found
