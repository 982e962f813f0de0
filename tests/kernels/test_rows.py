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
@pytest.mark.parametrize("form", norm.FORMS)
@pytest.mark.parametrize("width", [7, 64, 576])
def test_norm(dtype: torch.dtype, close: float, form: str, width: int) -> None:
    x, weight = numbers(3, 5, width, dtype=dtype) * 3, numbers(width, dtype=dtype)
    exact = gradients(lambda x: norm.reference(x, weight.double(), 1e-5, form), x.double())
    compare(gradients(lambda x: norm.fast(x, weight, 1e-5, form), x), exact, close)


def test_norm_in_bfloat16_is_transformers_own_to_the_last_bit() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(576, 1e-5).bfloat16().requires_grad_(False)
    theirs.weight.copy_(numbers(576))
    x = numbers(50, 576, dtype=torch.bfloat16)
    assert (norm.fast(x, theirs.weight, 1e-5, "twice") == theirs(x)).float().mean() > 0.999


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
        "rms_norm": lambda: torch.ops.ftrun.rms_norm(x, torch.ones(64), 1e-5, "twice")[0],
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


@TILES
def test_attention_hides_no_number_that_is_none() -> None:
    q, k, v = (numbers(1, 2, 40, 64, dtype=torch.bfloat16, seed=n) for n in range(3))
    q[0, 0, 7] = float("nan")
    out = attention.packed_attention(q, k, v, [40], 0.125)
    assert out[0, 0, 7].isnan().all()
    assert not out[0, 1].isnan().any()


@TILES
def test_heads_that_the_kernel_has_no_place_for_go_row_by_row() -> None:
    """Values of another width than queries (multi-head latent attention)."""
    q, k = (numbers(1, 2, 30, 64, dtype=torch.bfloat16, seed=n) for n in range(2))
    v = numbers(1, 2, 30, 32, dtype=torch.bfloat16, seed=2)
    out = attention.packed_attention(q, k, v, [20, 10], 0.125)
    assert (out.double() - by_rows(q.double(), k.double(), v.double(), [20, 10], None)).norm() <= 5e-3 * out.norm()


def test_capped_logits_of_any_size_have_a_loss() -> None:
    logits = torch.tensor([[5000.0, -5000.0, 3.0]])
    losses = torch.ops.ftrun.cross_entropy_(logits, torch.tensor([1]), 1.0, 30.0, True)
    assert losses.item() == pytest.approx(60, rel=1e-5)
    assert logits.isfinite().all()


def test_angles_of_another_dtype_are_taken_the_plain_way() -> None:
    """Under autocast heads are bfloat16 and the angles of float32 masters float32."""
    x, angles = numbers(1, 3, 9, 16, dtype=torch.bfloat16), (numbers(1, 9, 16), numbers(1, 9, 16, seed=1))
    assert torch.equal(rotary.fast(x, *angles), rotary.reference(x, *angles))


@TILES
def test_products_of_odd_shapes() -> None:
    """No rows at all, a weight amid a wider one, a weight turned over: what torch itself gives."""
    from ftrun.kernels import linear

    x, wide = numbers(40, 64, dtype=torch.bfloat16), numbers(24, 65, dtype=torch.bfloat16)
    assert linear.product([x[:0]], [wide[:, :64]], turned=True).shape == (0, 24)
    for weight in (wide[:, :64], wide[:, 1:], numbers(64, 24, dtype=torch.bfloat16).T):
        found, true = linear.product([x], [weight], turned=True), x.double() @ weight.double().T
        assert (found - true).norm() <= 4e-3 * true.norm()
