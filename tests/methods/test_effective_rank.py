"""How much of its rank each module's update uses, and what merging takes, as the methods tell them."""

from __future__ import annotations

import pytest
import torch

from ftrun.kernels.spectrum import effective_rank
from ftrun.methods.base import wrappers
from ftrun.methods.lora import LoRAEmbedding
from tests.methods.tuned import shake, tuned


@pytest.mark.parametrize("kind", ["full", "houlsby", "prompt"])
def test_a_method_without_a_rank_gives_none(kind: str) -> None:
    t = tuned("llama", kind)
    assert t.tuner.effective_ranks(t.model) is None


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_each_module_by_its_name_against_the_dense_update(kind: str) -> None:
    t = tuned("llama", kind)
    names = [site.name for site in t.anatomy.sites]
    assert t.tuner.effective_ranks(t.model) == dict.fromkeys(names, 0.0)
    shake(t)
    found = t.tuner.effective_ranks(t.model)
    assert list(found) == names
    for wrapper in wrappers(t.model):
        update = wrapper.scale * (wrapper.lora_B.detach().double() @ wrapper.lora_A.detach().double())
        dense = float(effective_rank(torch.linalg.svdvals(update)))
        assert found[wrapper.name] == pytest.approx(dense, rel=1e-4)
        assert 1 < dense <= 4


def test_embeddings_and_modules_kept_beside() -> None:
    t = tuned("llama", "lora", targets="embeddings", modules_to_save=["head"])
    shake(t)
    (name,) = (w.name for w in wrappers(t.model) if isinstance(w, LoRAEmbedding))
    found = t.tuner.effective_ranks(t.model)
    assert list(found) == [name]
    assert 1 < found[name] <= 4


def test_experts_give_their_mean() -> None:
    t = tuned("mixtral", "lora", targets="experts")
    shake(t)
    found = t.tuner.effective_ranks(t.model)
    assert len(found) == 4  # two products in two layers
    for wrapper in wrappers(t.model):
        update = wrapper.lora_B.detach() @ wrapper.lora_A.detach()
        each = [float(effective_rank(torch.linalg.svdvals(one))) for one in update]
        assert found[wrapper.name] == pytest.approx(sum(each) / len(each), rel=1e-3)


def test_what_merging_takes_is_what_the_merged_layers_hold() -> None:
    t = tuned("llama", "lora")
    told = t.tuner.merging_bytes(t.model, torch.float32)
    names = [wrapper.name for wrapper in wrappers(t.model)]
    t.tuner.merge(t.model)
    sizes = [t.model.get_submodule(name).weight.numel() for name in names]
    assert told == 4 * sum(sizes) + 16 * max(sizes)
    t.tuner.unmerge(t.model)
