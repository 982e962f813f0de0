"""DoRA: the factored norm against the norm as it is written, the fast node against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ftrun.kernels import compiled, dora, lora

IN, OUT, RANK, SCALE = 256, 192, 8, 2.0


def parts(dtype: torch.dtype = torch.float32, bias: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    w = (torch.randn(OUT, IN) * 0.02).to(dtype)
    made = {
        "x": torch.randn(3, 7, IN, dtype=dtype),
        "w": w,
        "a": torch.randn(RANK, IN) / IN**0.5,
        "b": torch.randn(OUT, RANK) * 0.01,
        "m": w.float().norm(dim=1) * (1 + 0.1 * torch.randn(OUT)),
    }
    made["bias"] = torch.randn(OUT, dtype=dtype) if bias else None  # type: ignore[assignment]
    return made


def fast(x, weight, bias, square, a, b, m, scale, dropout=0.0):  # type: ignore[no-untyped-def]
    if dropout:
        return dora.dropping(x, weight, bias, square, a, b, m, scale, dropout)
    return lora.fast(x, dora.factors(lambda dtype: weight(), bias, square, a, b, m, scale))[0]


def both(p: dict[str, torch.Tensor], x_grad: bool = True) -> list[list[torch.Tensor]]:
    found = []
    for quick in (False, True):
        x = p["x"].clone().requires_grad_(x_grad)
        a, b, m = (p[k].clone().requires_grad_() for k in ("a", "b", "m"))
        if quick:
            y = fast(x, lambda: p["w"], p["bias"], dora.squares(p["w"]), a, b, m, SCALE)
        else:
            y = dora.reference(x, p["w"], p["bias"], a, b, m, SCALE)
        (y.float() ** 2).sum().backward()
        found.append([y.detach(), a.grad, b.grad, m.grad, *([x.grad] if x_grad else [])])
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x_grad", [True, False])
def test_fast_is_the_reference_in_float32(bias: bool, x_grad: bool) -> None:
    for plain, quick in zip(*both(parts(bias=bias), x_grad), strict=True):
        assert (plain - quick).norm() <= 1e-6 * plain.norm()


def test_fast_in_bfloat16_is_within_its_rounding_and_gives_float32_gradients() -> None:
    p = parts(torch.bfloat16)
    exact = both({k: v.float() for k, v in p.items()})[0]
    for path in both(p):
        assert all(gradient.dtype == torch.float32 for gradient in path[1:4])
        for true, found in zip(exact, path, strict=True):
            assert (true - found.float()).norm() <= 1.2e-2 * true.norm()


def test_the_norm_is_a_constant_of_the_backward_pass() -> None:
    p = parts()
    a, b = p["a"].clone().requires_grad_(), p["b"].clone().requires_grad_()
    gain = (p["m"] / dora.plain_norm(p["w"], p["a"], p["b"], SCALE))[:, None]
    y = p["x"] @ (gain * (p["w"] + SCALE * b @ a)).T
    expected = torch.autograd.grad(y.square().sum(), (a, b))
    y = fast(p["x"], lambda: p["w"], None, dora.squares(p["w"]), a, b, p["m"], SCALE)
    for true, found in zip(expected, torch.autograd.grad(y.square().sum(), (a, b)), strict=True):
        assert (true - found).norm() <= 1e-5 * true.norm()


def test_the_factored_norm_and_what_bfloat16_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """W Aᵀ in bfloat16 moves the norm by some 1e-4, in float32 by 1e-7 (relative, the largest of 1024 rows)."""
    torch.manual_seed(0)
    w = (torch.randn(1024, 576) * 0.05).bfloat16()
    a, b = torch.randn(16, 576) / 576**0.5, torch.randn(1024, 16) * 0.05
    true = torch.linalg.vector_norm(w.double() + 2 * b.double() @ a.double(), dim=1)
    square = dora.squares(w)
    error = {}
    for name, crossed in (("float32", dora.cross(w, a)), ("bfloat16", (w @ a.bfloat16().T).float())):
        error[name] = float((dora.factored_norm(square, crossed, a, b, 2.0) / true - 1).abs().max())
    with capsys.disabled():
        print(f"\nDoRA's factored norm, largest relative error: {error}")
    assert error["float32"] < 5e-7
    assert 5e-5 < error["bfloat16"] < 2e-3


def test_no_float32_copy_of_a_low_precision_weight_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "_PIECE", 1024)
    p = parts(torch.bfloat16)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel() if out.dtype == torch.float32 else 0)
            return out

    with Watch():
        square = dora.squares(p["w"])
        dora.factored_norm(square, dora.cross(p["w"], p["a"]), p["a"], p["b"], SCALE)
    assert max(sizes) < OUT * IN / 4


def test_a_gain_near_one_keeps_its_digits_in_bfloat16() -> None:
    """A gain of 1.006 is 1.0078 in bfloat16; the mean of many outputs still moves by 0.006 (found: 0.0060)."""
    p = parts(torch.bfloat16, bias=False)
    norm = dora.plain_norm(p["w"], p["a"], p["b"], SCALE)
    x = torch.randn(4096, IN).bfloat16()
    low, high = (
        fast(x, lambda: p["w"], None, dora.squares(p["w"]), p["a"], p["b"], norm * gain, SCALE).float()
        for gain in (1.0, 1.006)
    )
    assert float((low * high).sum() / (low * low).sum()) == pytest.approx(1.006, abs=5e-4)


def test_dropout_spares_the_base() -> None:
    p = parts()
    gain_of_one = dora.plain_norm(p["w"], p["a"], p["b"] * 0, SCALE)
    args = (dora.squares(p["w"]), p["a"], p["b"] * 0, gain_of_one, SCALE, 0.5)
    y = fast(p["x"], lambda: p["w"], p["bias"], *args)
    assert torch.allclose(y, torch.nn.functional.linear(p["x"], p["w"], p["bias"]), atol=1e-6)
    a, b, m = (p[k].clone().requires_grad_() for k in ("a", "b", "m"))
    x = p["x"].clone().requires_grad_()
    y = fast(x, lambda: p["w"], None, dora.squares(p["w"]), a, b, m, SCALE, 0.5)
    torch.autograd.backward(y.sum())
    assert torch.allclose((x.grad * x).sum(), y.sum(), rtol=1e-4)


def test_shapes_alone_are_enough() -> None:
    p = parts()
    with FakeTensorMode():
        made = {k: torch.empty(v.shape) for k, v in p.items()}
        a, b, m = (made[k].requires_grad_() for k in ("a", "b", "m"))
        x, square = made["x"].requires_grad_(), dora.squares(made["w"])
        fast(x, lambda: made["w"], made["bias"], square, a, b, m, SCALE, 0.1).sum().backward()
    assert m.grad.shape == p["m"].shape


@pytest.mark.skipif(not compiled.tiles_at_hand(), reason="this processor has no AMX tiles")
@pytest.mark.parametrize(("rows", "width", "rank"), [(1, 32, 1), (70, 96, 5), (192, 576, 16), (64, 1536, 40)])
def test_the_product_with_a_on_tiles(rows: int, width: int, rank: int) -> None:
    """Measured: 16 bits of A leave 3e-6 of the product."""
    g = torch.Generator().manual_seed(0)
    weight, a = torch.randn(rows, width, generator=g).bfloat16(), torch.randn(rank, width, generator=g)
    true = weight.double() @ a.double().T
    assert (dora.cross(weight, a) - true).norm() <= 1e-5 * true.norm()


def test_a_row_of_zeros_gets_no_gradient_that_is_no_number() -> None:
    p = parts(bias=False)
    p["w"][3], p["m"][3], p["b"][3] = 0.0, 0.0, 0.0
    assert all(t.isfinite().all() for t in both(p)[1])
