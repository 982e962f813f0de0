"""Small trained parameters gathered into larger buffers: 8 bits cover them, paging is real, the optimiser's calls few.

bitsandbytes keeps float32 moments where a tensor has under 4,096 elements and pages only tensors of 1e5 or more: a
rank-16 matrix on width 4,096 has 65,536. So the small parameters of one place (a decoder layer, say) with one rate and
one decay become views of one flat parameter, which is what the optimiser knows. On real, fake and meta tensors alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

BLOCK = 256  # elements that share a scale in 8 bits: each parameter begins at a multiple, and has its scales alone
FINE_BELOW = 4096  # elements of a vector whose moments bitsandbytes keeps in float32, and so do we


class Flat:
    """Parameters of one dtype and device as views of one: `parameter` (elements,), with zeros between its pieces."""

    def __init__(self, pieces: Sequence[nn.Parameter]) -> None:
        self.pieces = tuple(pieces)
        whole = torch.zeros(size_of(pieces), dtype=pieces[0].dtype, device=pieces[0].device)
        for piece, view in zip(self.pieces, self._views(whole), strict=True):
            view.copy_(piece.detach())
            piece.data = view
        self.parameter = nn.Parameter(whole)

    def gather_gradients(self) -> None:
        """The pieces' gradients as the parameter's own; a missing one counts as zeros, unless all are missing.

        Raises RuntimeError where a piece is a view no more, as after a move to another device: it would not train.
        """
        if all(piece.grad is None for piece in self.pieces):
            return
        own = self.parameter.untyped_storage()._cdata
        if any(piece.untyped_storage()._cdata != own for piece in self.pieces):
            raise RuntimeError("a trained parameter was moved or replaced after its optimiser was made")
        gradient = torch.zeros_like(self.parameter)
        views = zip(self._views(gradient), self.pieces, strict=True)
        pairs = [(view, piece.grad) for view, piece in views if piece.grad is not None]
        torch._foreach_copy_([view for view, _ in pairs], [small for _, small in pairs])
        for piece in self.pieces:
            piece.grad = None
        self.parameter.grad = gradient

    def _views(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """The pieces' places in a tensor of the parameter's size, in their shapes."""
        found, start = [], 0
        for piece in self.pieces:
            found.append(whole[start : start + piece.numel()].view(piece.shape))
            start += filled(piece)
        return found


class Gathered:
    """The flat parameters of an optimiser. Made of none, it does nothing."""

    def __init__(self, flats: Iterable[Flat] = ()) -> None:
        # the largest comes last, so that what is held twice grows evenly with the number of equal layers
        self.flats = sorted(flats, key=lambda flat: flat.parameter.numel())
        self._holders = {piece: flat.parameter for flat in self.flats for piece in flat.pieces}

    def holder(self, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter that the optimiser knows a trained parameter by: a flat one, or itself."""
        return self._holders.get(parameter, parameter)  # type: ignore[call-overload]

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Before the optimiser's step: one buffer's gradients at a time are held twice, then the small ones freed."""
        for flat in self.flats:
            flat.gather_gradients()


def buckets(
    groups: Iterable[Mapping[str, Any]], place: Callable[[torch.Tensor], Hashable], below: int
) -> list[dict[str, Any]]:
    """The groups, "params" being lists of parameters that share a buffer; those of equal options become one group.

    groups: params, lr, weight_decay of each. place: only parameters of one place share a buffer. below: parameters of
    so many elements or more stay alone, whatever their place. Vectors of under FINE_BELOW elements come in groups of
    their own, with `bits` 32: gathered, they keep the float32 moments that they have alone.
    """
    found: dict[Hashable, dict[Hashable, list[nn.Parameter]]] = {}
    options: dict[Hashable, dict[str, Any]] = {}
    for group in groups:
        for parameter in group["params"]:
            small, fine = parameter.numel() < below, parameter.ndim < 2 and parameter.numel() < FINE_BELOW
            own = {k: v for k, v in group.items() if k != "params"} | ({"bits": 32} if fine else {})
            kind = tuple(sorted(own.items()))
            options[kind] = own
            bucket = (place(parameter), parameter.dtype, parameter.device) if small else id(parameter)
            found.setdefault(kind, {}).setdefault(bucket, []).append(parameter)
    return [{**options[kind], "params": list(inside.values())} for kind, inside in found.items()]


@torch.no_grad()
def gather(groups: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Gathered]:
    """(the groups of `buckets` for an optimiser, a flat parameter for each bucket of several; what was gathered).

    The parameters keep their values and become views: write to them in place from now on, and do not move them.
    """
    made, flats = [], []
    for group in groups:
        own = []
        for bucket in group["params"]:
            if len(bucket) > 1:
                flats.append(Flat(bucket))
            own.append(flats[-1].parameter if len(bucket) > 1 else bucket[0])
        made.append({**group, "params": own})
    return made, Gathered(flats)


def size_of(bucket: Sequence[torch.Tensor]) -> int:
    """Elements of the parameter that the optimiser knows a bucket by."""
    return sum(map(filled, bucket)) if len(bucket) > 1 else bucket[0].numel()


def filled(piece: torch.Tensor) -> int:
    """Elements that a parameter takes in a bucket of several."""
    return -(-piece.numel() // BLOCK) * BLOCK
