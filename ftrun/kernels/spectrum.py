"""How much of its rank a low-rank product uses: its singular values, and their effective rank."""

from __future__ import annotations

import torch


def singular_values(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Those of B A, in descending order: (…, k) float32, k = min(rank, in, out).

    a (…, rank, in) and b (…, out, rank) of any float dtype. The (out, in) product is never formed: with B = Q R and
    Aᵀ = P S (QR decompositions) it is Q (R Sᵀ) Pᵀ, so that the small R Sᵀ has the same singular values.
    """
    r = torch.linalg.qr(b.detach().float(), mode="r").R
    s = torch.linalg.qr(a.detach().float().mT, mode="r").R
    return torch.linalg.svdvals(r @ s.mT)


def effective_rank(values: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of the singular values' shares of their sum (Roy & Vetterli 2007, definition 1).

    values (…, k), none negative -> (…): from 1, where one of them is all, to k, where all are equal; 0 where all are 0.
    A factor on all of them changes nothing.
    """
    total = values.sum(-1, keepdim=True)
    shares = values / torch.where(total > 0, total, 1)
    return torch.special.entr(shares).sum(-1).exp() * (total.squeeze(-1) > 0)
