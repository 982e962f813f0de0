"""The compiled kernels of norm, gated activation, rotary positions, attention, loss and NF4 against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from ftrun.kernels import attention, blockwise, compiled, gated, norm, rotary
from ftrun.kernels.loss import _cross_entropy

pytestmark = pytest.mark.skipif(compiled.library() is None, reason=f"no compiled kernels: {compiled.trouble()}")
BOTH = pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + 1000 * seed)).to(dtype)


def gradients(run: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The value and the gradients of the inputs, under a gradient of random numbers."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = run(*leaves)
    out.backward(numbers(*out.shape).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def compare(found: list[torch.Tensor], exact: list[torch.Tensor], close: float, share: float = 0.0) -> None:
    """share: of the largest of them, which counts as a size where a true value is next to nothing."""
    least = share * max(float(true.double().norm()) for true in exact)
    for ours, true in zip(found, exact, strict=True):
        assert ours.shape == true.shape
        assert (ours.double() - true.double()).norm() <= close * max(least, float(true.double().norm()))


@BOTH
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("width", [7, 64, 576])
def test_norm(dtype: torch.dtype, close: float, plus_one: bool, width: int) -> None:
    x, weight = numbers(3, 5, width, dtype=dtype) * 3, numbers(width, dtype=dtype)
    exact = gradients(lambda x: norm.reference(x, weight.double(), 1e-5, plus_one), x.double())
    compare(gradients(lambda x: norm.fast(x, weight, 1e-5, plus_one), x), exact, close)


def test_norm_in_bfloat16_is_transformers_own_to_the_last_bit() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(576, 1e-5).bfloat16().requires_grad_(False)
    theirs.weight.copy_(numbers(576))
    x = numbers(50, 576, dtype=torch.bfloat16)
    assert (norm.fast(x, theirs.weight, 1e-5, False) == theirs(x)).float().mean() > 0.999


@BOTH
@pytest.mark.parametrize("act", gated.ACTS)
def test_gated(dtype: torch.dtype, close: float, act: str) -> None:
    gate, up = numbers(4, 9, 37, dtype=dtype) * 4, numbers(4, 9, 37, dtype=dtype)
    gate[0, 0, :4] = torch.tensor([80.0, -80.0, 0.0, -0.0])
    exact = gradients(lambda g, u: gated.reference(g, u, act), gate.double(), up.double())
    compare(gradients(lambda g, u: gated.fast(g, u, act), gate, up), exact, close)


@BOTH
@pytest.mark.parametrize(("size", "turned"), [(64, 64), (80, 32), (16, 16), (6, 2)])
def test_rotary(dtype: torch.dtype, close: float, size: int, turned: int) -> None:
    heads = numbers(1, 11, 3, size, dtype=dtype).transpose(1, 2)
    angles = numbers(1, 11, turned, dtype=dtype), numbers(1, 11, turned + 1, dtype=dtype)[..., :turned]
    exact = gradients(lambda x: rotary.reference(x, *(a.double() for a in angles)), heads.double())
    compare(gradients(lambda x: rotary.fast(x, *angles), heads), exact, close)


@BOTH
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 3.0), (1.7, 2.0)])
def test_cross_entropy(dtype: torch.dtype, close: float, scale: float, cap: float) -> None:
    logits, targets = numbers(9, 1003, dtype=dtype) * 3, torch.tensor([0, 1002, 5, -100, 7, 8, -100, 3, 1])
    exact = logits.double()
    losses = _cross_entropy(exact, targets, scale, cap, True)
    found = logits.clone()
    compare([torch.ops.ftrun.cross_entropy_(found, targets, scale, cap, True), found], [losses, exact], close)
    assert not found[targets == -100].any()
    untouched = logits.clone()
    torch.ops.ftrun.cross_entropy_(untouched, targets, 1.0, 0.0, False)
    assert torch.equal(untouched, logits)


@pytest.mark.parametrize("name", ["rms_norm", "gated", "cross_entropy_"])
def test_what_is_no_number_stays_none(name: str) -> None:
    """A loss that is not finite must be seen: no kernel may hide it."""
    x = numbers(2, 64)
    x[0, 3] = float("nan")
    ops = {
        "rms_norm": lambda: torch.ops.ftrun.rms_norm(x, torch.ones(64), 1e-5, False)[0],
        "gated": lambda: torch.ops.ftrun.gated(x, torch.ones(2, 64), "silu"),
        "cross_entropy_": lambda: torch.ops.ftrun.cross_entropy_(x, torch.tensor([1, 1]), 1.0, 0.0, True),
    }
    found = ops[name]()
    assert found[0].isnan().any()
    assert not found[1].isnan().any()


TILES = pytest.mark.skipif(not compiled.tiles_at_hand(), reason="this processor has no AMX tiles")


def by_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], window: int | None) -> torch.Tensor:
    """Plain softmax attention in float64, row by row."""
    groups, out, at = q.shape[1] // k.shape[1], [], 0
    for n in lengths:
        queries, keys, values = (t[:, :, at : at + n] for t in (q, k, v))
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        apart = torch.arange(n)[:, None] - torch.arange(n)[None]
        seen = (apart >= 0) & (apart < (window or n))
        scores = (queries @ keys.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
        out.append(scores.softmax(-1) @ values)
        at += n
    return torch.cat(out, 2)


@TILES
@pytest.mark.parametrize("window", [None, 1, 20, 33, 200])
@pytest.mark.parametrize("lengths", [[1], [5], [32], [33, 64, 17, 1, 100], [130, 300]])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (3, 3, 80), (2, 1, 256), (2, 2, 16)])
def test_attention(heads: int, kv_heads: int, size: int, lengths: list[int], window: int | None) -> None:
    total = sum(lengths)
    q = numbers(1, total, heads, size, dtype=torch.bfloat16).transpose(1, 2)
    k, v = (
        numbers(1, total + n, kv_heads, size, dtype=torch.bfloat16, seed=n + 1)[:, n:].transpose(1, 2) for n in (0, 1)
    )
    exact = gradients(lambda *t: by_rows(*t, lengths, window), q.double(), k.double(), v.double())
    run = lambda *t: attention.packed_attention(*t, lengths, size**-0.5, window)  # noqa: E731
    compare(gradients(run, q, k, v), exact, 5e-3, share=0.1)


@TILES
def test_no_token_sees_another_row_or_the_future() -> None:
    """Changed last tokens change nothing before them; a changed row changes no other row: to the last bit."""
    q, k, v = (numbers(1, 2, 90, 64, dtype=torch.bfloat16, seed=n) for n in range(3))
    before = attention.packed_attention(q, k, v, [50, 40], 0.125)
    k[:, :, 45:50], v[:, :, 45:50] = 100.0, -50.0
    after = attention.packed_attention(q, k, v, [50, 40], 0.125)
    assert torch.equal(before[:, :, :45], after[:, :, :45])
    assert torch.equal(before[:, :, 50:], after[:, :, 50:])
    assert not torch.equal(before[:, :, 45:50], after[:, :, 45:50])


@TILES
def test_attention_is_the_same_whatever_the_threads() -> None:
    q, k, v = (numbers(1, 3, 200, 64, dtype=torch.bfloat16, seed=n) for n in range(3))
    run = lambda *t: attention.packed_attention(*t, [120, 80], 0.125)  # noqa: E731
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(run, q, k, v))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 128, 4096])
def test_4_bits_are_made_dense_as_bitsandbytes_does(kind: str, block: int) -> None:
    weight = numbers(96, 4096)
    packed, absmax = blockwise.quantise_4bit(weight, kind, block)
    ours = torch.ops.ftrun.dequantise_4bit(packed, absmax, kind, block, [96, 4096])
    assert torch.equal(ours, blockwise.reference_dequantise_4bit(packed, absmax, kind, block, (96, 4096), ours.dtype))


def test_where_no_compiler_is_models_run_by_their_own_code(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    compiled.library.cache_clear()
    try:
        assert "no C++ compiler" in str(compiled.trouble())
        assert not compiled.takes(numbers(2))
        logits = F.linear(numbers(3, 4), numbers(5, 4))
        assert not compiled.takes(logits)
    finally:
        compiled.library.cache_clear()
