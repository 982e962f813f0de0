"""Models run by our kernels: each family computes what its own code does; what we do not know stays as it is."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from ftrun.kernels import compiled
from ftrun.models.forward import PACKED, TokenLoss, register_attention
from ftrun.models.fuse import fuse
from ftrun.values import IGNORE, Batch, rounded
from tests.families import FAMILIES, tiny_model
from tests.methods.tuned import tuner_of
from tests.models.test_forward import LENGTHS, packed

pytestmark = pytest.mark.skipif(compiled.library() is None, reason=f"no compiled kernels: {compiled.trouble()}")
# what of each family's two layers runs by our kernels: norms, gated feed-forwards, attentions
FUSED = {
    "llama": (5, 2, 2),
    "mistral": (5, 2, 2),
    "qwen2": (5, 2, 2),
    "qwen3": (9, 2, 2),
    "gemma2": (9, 2, 2),
    "gemma3_text": (13, 2, 2),
    "phi3": (5, 0, 0),
    "phi": (0, 0, 2),
    "smollm3": (5, 2, 2),
    "olmo2": (9, 2, 2),
    "gpt2": (0, 0, 0),
    "gpt_neox": (0, 0, 0),
    "opt": (0, 0, 0),
    "mixtral": (5, 0, 2),
    "qwen3_moe": (9, 0, 2),
}


def counted(model: nn.Module) -> tuple[int, ...]:
    found = Counter(m.forward.func.__name__ for m in model.modules() if "forward" in vars(m))  # type: ignore[attr-defined]
    return tuple(found[name] for name in ("_norm", "_gated", "_attention"))


def tuned(family: str, fused: bool, dtype: torch.dtype = torch.float32) -> Any:
    """A frozen tiny model with LoRA, B away from zero."""
    model = tiny_model(family).to(dtype)
    model.requires_grad_(False)
    model.set_attn_implementation(PACKED)
    if fused:
        fuse(model)
    from ftrun.models.select import anatomy

    tuner = tuner_of("lora", targets="all")
    tuner.attach(model, anatomy(model, "all", "all"), kernels="fast")
    tuner.initialise(model, 0, None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def outcome(model: Any, batch: Batch) -> list[torch.Tensor]:
    loss = TokenLoss(model, "fast")(batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_the_same(family: str) -> None:
    register_attention()
    state = torch.get_rng_state()
    own, ours = (outcome(tuned(family, fused), packed()) for fused in (False, True))
    assert torch.equal(state, torch.get_rng_state()), "a trial must not touch the run's random numbers"
    assert len(own) == len(ours)
    for true, found in zip(own, ours, strict=True):
        assert (true - found).norm() <= 1e-5 * true.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_of_a_family_is_fused(family: str) -> None:
    register_attention()
    model = tiny_model(family)
    fuse(model)
    assert counted(model) == FUSED[family]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi"])
def test_in_bfloat16_it_is_as_near_to_float32_as_the_familys_own(family: str) -> None:
    register_attention()
    exact = outcome(tuned(family, fused=False), packed())
    own, ours = (outcome(tuned(family, fused, torch.bfloat16), packed()) for fused in (False, True))

    def error(found: list[torch.Tensor]) -> float:
        return float(torch.stack([(a.float() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]).mean())

    assert error(ours) <= 1.3 * error(own)


def test_a_block_that_does_something_of_its_own_stays_as_it_is() -> None:
    from transformers.models.llama import modeling_llama

    class OddRMSNorm(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 1.001

    class OddMLP(modeling_llama.LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=1) * self.up_proj(x))

    class ClampedMLP(modeling_llama.LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=16) * self.up_proj(x))

    class OddAttention(modeling_llama.LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(*args, **kwargs)
            return out * 2, weights

    register_attention()
    model = tiny_model("llama")
    for module in model.modules():
        for odd in (OddRMSNorm, OddMLP, OddAttention):
            if type(module) is odd.__bases__[0]:
                module.__class__ = odd
    model.model.layers[0].mlp.__class__ = ClampedMLP
    fuse(model)
    assert counted(model) == (0, 0, 0)


def test_a_module_that_a_trial_stumbles_over_stays_as_it_is() -> None:
    register_attention()
    model = tiny_model("qwen3")
    for layer in model.model.layers:
        layer.self_attn.q_norm = nn.Identity()  # has no weight
    fuse(model)
    assert counted(model)[2] == 0


def test_a_filler_changes_nothing() -> None:
    """Rows with a last row of padding: the same loss and gradients."""
    register_attention()
    plain = packed()
    more = rounded(sum(LENGTHS) + 8) - sum(LENGTHS)
    filler = Batch(
        *(torch.cat([t, t.new_full((1, more), value)], 1) for t, value in (
            (plain.input_ids, 7), (plain.position_ids, 0), (plain.targets, IGNORE))),
        plain.lengths, True, plain.tokens, plain.supervised, plain.rows, filler=more,
    )  # fmt: skip
    model = tuned("llama", fused=True)
    other = copy.deepcopy(tuned("llama", fused=False))
    for true, found in zip(outcome(other, plain), outcome(model, filler), strict=True):
        assert (true - found).norm() <= 1e-5 * true.norm()


def test_generation_and_padded_rows_run_by_the_familys_own_attention() -> None:
    register_attention()
    model = tiny_model("llama")
    ids = torch.randint(5, 260, (2, 9), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    fuse(model)
    after = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.allclose(before[0], after[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(before[1], after[1])
