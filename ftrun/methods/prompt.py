"""Prompt tuning (Lester et al. 2021): k learnt vectors in front of every row, the model itself untouched.

The data puts the ids V, V+1, …, V+k−1 (V: rows of the embedding) in front of each row; the embedding answers them
with the learnt vectors. Packing, positions and caches see k more tokens and need to know nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ftrun.errors import UserError
from ftrun.methods import base
from ftrun.schema import option
from ftrun.values import Anatomy


@dataclass(frozen=True)
class Options:
    tokens: int = option(20, "virtual tokens in front of each row; they count in seq_len", ge=1)
    init: str = option("vocabulary", "how they start", choices=("vocabulary", "text", "random"))
    text: str | None = option(None, "the text that they start from, with init=text")
    dtype: str = option("float32", "dtype of the vectors", choices=("float32", "bfloat16"))
    from_: str | None = option(None, "folder of an adapter to start from", alias="from")

    def __post_init__(self) -> None:
        if self.init == "text" and not self.text:
            raise UserError("method.init=text: give the text that the virtual tokens start from, as method.text='…'")
        if self.init != "text" and self.text is not None:
            raise UserError(f"method.text: has no effect with method.init={self.init}; use method.init=text")


class Prompt(base.Wrapper):
    """An embedding of V tokens that answers the ids from V on with learnt vectors (k, width)."""

    def __init__(self, name: str, embedding: nn.Module, tokens: int, dtype: torch.dtype) -> None:
        super().__init__(name, embedding)
        rows = self.weight.shape[0]
        width = self.base.embedding_dim
        self.first = rows
        self.vectors = base.parameter((tokens, width), embedding, dtype)

    def own(self) -> dict[str, base.Trained]:
        return {"prompt_embeddings": base.Trained("other", self.vectors)}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.joined(ids, self.base(self.seen(ids)))

    def seen(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.masked_fill(ids >= self.first, 0)

    def joined(self, ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        virtual = ids >= self.first
        learnt = F.embedding((ids - self.first).clamp_min(0), self.vectors.to(out.dtype))
        return torch.where(virtual[..., None], learnt, out)

    def rescale(self, factor: float) -> None:
        if factor != 1:
            raise UserError(f"scale={factor:g}: method=prompt has no update to scale: its tokens are there or not")

    def start(self, ids: list[int]) -> None:
        """Starts from the embeddings of these tokens, repeated or cut to the number of virtual tokens."""
        count = self.vectors.shape[0]
        repeated = (ids * -(-count // len(ids)))[:count]
        with torch.no_grad():
            self.vectors.copy_(self.base(torch.tensor(repeated, device=self.vectors.device)))

    def start_at_random(self, generator: torch.Generator) -> None:
        """Normal values with the spread of the vocabulary's embeddings: the model has seen no others."""
        sample = torch.randint(self.first, (256,), generator=generator)
        with torch.no_grad():
            spread = self.base(sample.to(self.vectors.device)).float().std()
            self.vectors.copy_(torch.randn(self.vectors.shape, generator=generator).to(spread.device) * spread)


class Tuner(base.Tuner[Options]):
    """k virtual tokens, learnt; nothing of the model changes."""

    needs = "embeddings"
    merges = False
    why_not = "its tokens stand in front of the input; they belong to no weight of the model"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.prefix = options.tokens
        self._facts: dict[str, Any] = {}

    def wrap(self, model: nn.Module, anatomy: Anatomy, kernels: str) -> list[base.Wrapper]:
        embedding = model.get_submodule(anatomy.embeddings)
        config = getattr(model, "config", None)
        made = Prompt(anatomy.embeddings, embedding, self.options.tokens, getattr(torch, self.options.dtype))
        self._facts = {
            "token_dim": made.vectors.shape[1],
            "num_layers": anatomy.depth,
            "num_attention_heads": getattr(config, "num_attention_heads", None),
        }
        return [made]

    def initialise(self, model: nn.Module, seed: int, tokenizer: Any = None) -> None:
        """First vectors: embeddings of random tokens, of a text (this needs the tokenizer), or random ones."""
        for wrapper in base.wrappers(model):
            assert isinstance(wrapper, Prompt)
            if base.is_abstract(wrapper.vectors):
                continue
            generator = wrapper.generator(seed)
            if self.options.init == "random":
                wrapper.start_at_random(generator)
            elif self.options.init == "text":
                wrapper.start(self._tokens_of_text(tokenizer))
            else:
                wrapper.start(torch.randint(wrapper.first, (self.prefix,), generator=generator).tolist())

    def _tokens_of_text(self, tokenizer: Any) -> list[int]:
        if tokenizer is None:
            raise UserError("method.init=text: this base has no tokenizer to read method.text with")
        ids: list[int] = tokenizer(self.options.text)["input_ids"]
        if not ids:
            raise UserError(f"method.text={self.options.text!r}: holds no token")
        return ids

    def named(self, model: nn.Module) -> dict[str, base.Trained]:
        # PEFT's file holds this one name, without the module's
        return {name: item for wrapper in base.wrappers(model) for name, item in wrapper.own().items()}

    def check(self, config: Mapping[str, Any]) -> None:
        self.check_same(config, self._meaning())

    def _meaning(self) -> dict[str, Any]:
        return {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": self.options.tokens}

    def adapter_config(self, anatomy: Anatomy, base_name: str) -> dict[str, Any]:
        return {
            **self._meaning(),
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
            **self._facts,
        }
