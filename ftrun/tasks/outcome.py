"""What a run came to, as result.json has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftrun.tasks.session import Session


def summary(session: Session) -> dict[str, Any]:
    """result.json but for its status."""
    progress, plan, parts = session.progress, session.settled.plan, session.parts
    return {
        "status": "",
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "tokens_per_s": progress.tokens / progress.seconds if progress.seconds else None,
        "loss_first": progress.loss_first,
        "loss_last": progress.loss_last,
        "recoveries": progress.recoveries,
        "skipped": progress.skipped,
        "checkpoints": {"saved": progress.saves, "waited_seconds": progress.save_seconds},
        "eval": {when: _figures(found) for when, found in session.evals.items()},
        "samples": _samples(session.evals),
        **session.judge.figures,
        "memory": {**session.peak.figures, "process_peak_bytes": progress.peak_bytes},
        "total_params": plan.total_params,
        "trainable_params": plan.trainable_params,
        "adapter_bytes": _trained_bytes(session),
        "base": {**parts.base.describe(), "quantisation": parts.quantiser.scheme()},
    }


def _trained_bytes(session: Session) -> int:
    """Bytes of the trained tensors as they are saved."""
    if not hasattr(session, "work"):
        return 0
    named = session.parts.tuner.named(session.parts.model).values()
    return sum(t.parameter.numel() * t.parameter.element_size() for t in named)


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    return {k: found[k] for k in ("loss", "perplexity", "tokens") if k in found}


def _samples(evals: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    answers = {when: found["answer"] for when, found in evals.items() if found.get("answer") is not None}
    prompt = next((found["prompt"] for found in evals.values() if "prompt" in found), None)
    return [{"prompt": prompt, **answers}] if answers else []
