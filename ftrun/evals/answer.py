"""One prompt answered, as a user would see it: greedy, with the cache, up to the end-of-sequence token."""

from __future__ import annotations

from typing import Any

import torch

from ftrun.errors import UserError


def answer(model: Any, tokenizer: Any, prompt_ids: list[int], max_new_tokens: int) -> str:
    """The model's continuation of `prompt_ids` (special tokens left out), decoded greedily; dropout off.

    Where the model has a table of positions, the answer ends with it. Raises UserError where the prompt fills it.
    """
    most = getattr(model, "table_of_positions", None)
    if most is not None and len(prompt_ids) >= most:
        raise UserError(f"eval.prompt: {len(prompt_ids)} tokens; the model has {most} positions, the answer's counted")
    if most is not None:
        max_new_tokens = min(max_new_tokens, most - len(prompt_ids))
    was_training = model.training
    model.eval()
    ids = torch.tensor([prompt_ids], device=model.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            eos_token_id=_ends(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    model.train(was_training)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's, and those of the model's generation config."""
    theirs = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [theirs] if isinstance(theirs, int) else list(theirs or [])
    return sorted({i for i in [tokenizer.eos_token_id, *ends] if i is not None})
