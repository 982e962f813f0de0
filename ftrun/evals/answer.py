"""One prompt answered, as a user would see it: greedy, with the cache, up to the end-of-sequence token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ftrun.errors import UserError

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}

_BEGINNING = 16  # tokens of a plain text that its continuation is asked for


def answer(model: Any, tokenizer: Any, prompt_ids: list[int], max_new_tokens: int) -> str:
    """The model's continuation of `prompt_ids` (special tokens left out), decoded greedily; dropout off.

    Where the model has a table of positions, the answer ends with it. Raises UserError where the prompt fills it.
    """
    room = room_for(model, len(prompt_ids), max_new_tokens)
    if not room:
        most = model.table_of_positions
        raise UserError(f"eval.prompt: {len(prompt_ids)} tokens; the model has {most} positions, the answer's counted")
    out = generated(model, tokenizer, [prompt_ids], room, **GREEDY)
    return str(tokenizer.decode(out[0], skip_special_tokens=True)).strip()


def generated(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: int, **how: Any) -> torch.Tensor:
    """What the model writes after prompts of one length: (prompts, up to `tokens`) int64; dropout off, no gradient.

    A row goes on to its end token, and is padded from there on; all of them together, with the cache. how: for
    transformers' generate.
    """
    was_training = model.training
    model.eval()
    ids = torch.tensor(prompts, device=model.device)
    try:
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                use_cache=True,
                eos_token_id=ends(model, tokenizer),
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **how,
            )
    finally:
        model.train(was_training)
    return out[:, ids.shape[1] :]


def room_for(model: Any, used: int, tokens: int) -> int:
    """So many tokens after `used` ones, or as many as the model's table of positions leaves them, none below 0."""
    most = getattr(model, "table_of_positions", None)
    return tokens if most is None else max(0, min(tokens, most - used))


def ends(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's, and those of the model's generation config."""
    theirs = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [theirs] if isinstance(theirs, int) else list(theirs or [])
    return sorted({i for i in [tokenizer.eos_token_id, *found] if i is not None})


def prompt_ids(prompt: str | None, tokenizer: Any, held_out: Any) -> list[int]:
    """The tokens of a user's prompt in the chat template, or the first held-out row up to its first learnt token; of a
    plain text, where nothing comes before that, the row's beginning.
    """
    if prompt is None:
        before = len(held_out.prefix_ids)
        row, first = held_out.ids(0)[before:], int(held_out.learn(0).argmax()) - before
        return [int(i) for i in row[: first if first > 0 else min(_BEGINNING, max(1, len(row) // 2))]]
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    return list(tokenizer(prompt).input_ids)


def asked(ids: list[int], tokenizer: Any) -> str:
    """The words of a row's prompt, without the frame that the chat template puts around a user's message."""
    text = str(tokenizer.decode(ids))
    if tokenizer.chat_template:
        message = [{"role": "user", "content": "\x00"}]
        frame = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, _, after = frame.partition("\x00")
        if after and text.startswith(before) and text.endswith(after):
            return text[len(before) : -len(after)]
    return str(tokenizer.decode(ids, skip_special_tokens=True))
