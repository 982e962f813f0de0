"""What every family owes to an attention function of our own: our arguments reach it, and positions count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.families import FAMILIES, tiny_model

SEEN: list[dict[str, Any]] = []


def _probe(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    SEEN.append({**kwargs, "mask": mask, "heads": (query.shape[1], key.shape[1])})
    kwargs = {k: kwargs.get(k) for k in ("scaling", "dropout")}
    return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    AttentionInterface.register("probe", _probe)
    AttentionMaskInterface.register("probe", lambda *args, **kwargs: None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("whole", [True, False])
def test_arguments_of_ours_reach_every_layers_attention(family: str, whole: bool) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("probe")
    SEEN.clear()
    ids, positions = torch.arange(5, 29)[None], torch.arange(24)[None]
    run = model if whole else model.base_model
    run(ids, position_ids=positions, use_cache=False, row_lengths=(12, 12))
    assert len(SEEN) == 2
    for seen in SEEN:
        assert seen["row_lengths"] == (12, 12)
        assert seen["mask"] is None
        assert seen["scaling"] > 0
        assert seen["heads"][1] in (2, 4)  # keys and values come as they are, not repeated
        assert ("softcap" in seen) == (family == "gemma2")


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_that_restart_change_the_second_row_alone(family: str) -> None:
    model = tiny_model(family)
    ids, positions = torch.arange(5, 25)[None], torch.arange(20)[None]
    restarted = positions.clone()
    restarted[:, 10:] -= 10
    with torch.no_grad():
        plain, packed = (
            model(ids, position_ids=p, attention_mask=torch.ones(1, 1, 20, 20).tril().log(), use_cache=False).logits
            for p in (positions, restarted)
        )
    assert torch.allclose(plain[:, :10], packed[:, :10], atol=1e-5)
    assert (plain[:, 10:] - packed[:, 10:]).abs().max() > 1e-3
