"""How far a tuned model is from its base, token by token: the likeliest next token, and the divergence of all of them.

Both are asked of the learnt tokens of the same rows. The logits of a whole vocabulary are held for one chunk of tokens
at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ftrun.values import Batch

CHUNK = 256  # tokens of logits at once, of either model


@dataclass(frozen=True)
class View:
    """A model as one looks at rows through it.

    states: batch -> hidden states (N, D) of its learnt tokens, in order, and these tokens (N,) int64. logits: such
    states -> (N, V) float32. Both are called within `within`, which makes the model the one that is meant.
    """

    batches: Sequence[Batch]
    states: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
    logits: Callable[[torch.Tensor], torch.Tensor]
    within: Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Scored:
    """What a model makes of the learnt tokens of some rows: losses (N,) float32 in nats, likeliest (N,) int64, and the
    tokens themselves (N,) int64; on the host.
    """

    losses: torch.Tensor
    likeliest: torch.Tensor
    tokens: torch.Tensor


def divergence(base: View, tuned: View, chunk: int = CHUNK) -> dict[str, float]:
    """Means over the learnt tokens: `agreement`, the share with the same likeliest next token; `kl`,
    KL(base ‖ tuned) = Σ p log(p / q) over the vocabulary, and `kl_reverse`, KL(tuned ‖ base), in nats a token.
    """
    same, forward, reverse, count = 0, 0.0, 0.0, 0
    for own, other in zip(base.batches, tuned.batches, strict=True):
        with torch.no_grad():
            with base.within():
                states_b, tokens = base.states(own)
            with tuned.within():
                states_t, others = tuned.states(other)
            assert torch.equal(tokens, others), "both are asked of the same tokens"
            for first, second in zip(states_b.split(chunk), states_t.split(chunk), strict=True):
                with base.within():
                    p = base.logits(first).log_softmax(-1)
                with tuned.within():
                    q = tuned.logits(second).log_softmax(-1)
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
                forward += float(_kl(p, q))
                reverse += float(_kl(q, p))
                count += len(p)
    most = max(count, 1)
    return {"tokens": count, "agreement": same / most, "kl": forward / most, "kl_reverse": reverse / most}


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Σ exp(p) (p − q) over rows of log-probabilities; what p holds for impossible counts nothing."""
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(dtype=torch.float64)


def score(view: View, chunk: int = CHUNK) -> Scored:
    """Each learnt token's loss, and what the model held likeliest in its place."""
    losses, likeliest, every = [], [], []
    for batch in view.batches:
        with torch.no_grad(), view.within():
            states, tokens = view.states(batch)
            for part, targets in zip(states.split(chunk), tokens.split(chunk), strict=True):
                logits = view.logits(part)
                losses.append(F.cross_entropy(logits, targets, reduction="none").cpu())
                likeliest.append(logits.argmax(-1).cpu())
            every.append(tokens.cpu())
    return Scored(torch.cat(losses), torch.cat(likeliest), torch.cat(every))
