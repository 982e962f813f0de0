"""LoRA's product: the fast node against plain autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ftrun.kernels.lora import Factors, fast, reference, together

IN, OUT, RANK, SCALE = 48, 40, 4, 2.0


def parts(dtype: torch.dtype = torch.float32, bias: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {
        "x": torch.randn(3, 7, IN, dtype=dtype),
        "w": torch.randn(OUT, IN, dtype=dtype) / IN**0.5,
        "a": torch.randn(RANK, IN) / IN**0.5,
        "b": torch.randn(OUT, RANK),
    }
    made["bias"] = torch.randn(OUT, dtype=dtype) if bias else None  # type: ignore[assignment]
    return made


def one(x, weight, bias, a, b, dropout=0.0):  # type: ignore[no-untyped-def]
    return fast(x, Factors(lambda dtype: weight(), bias, a, b, SCALE), dropout=dropout)[0]


def both(p: dict[str, torch.Tensor], x_grad: bool = True) -> list[list[torch.Tensor]]:
    found = []
    for which in (reference, fast):
        x, a, b = p["x"].clone().requires_grad_(x_grad), p["a"].clone(), p["b"].clone()
        a.requires_grad_(), b.requires_grad_()
        if which is reference:
            y = reference(x, lambda v: F.linear(v, p["w"], p["bias"]), a, b, SCALE)
        else:
            y = one(x, lambda: p["w"], p["bias"], a, b)
        (y.float() ** 2).sum().backward()
        found.append([y.detach(), a.grad, b.grad, *([x.grad] if x_grad else [])])
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x_grad", [True, False])
def test_fast_is_the_reference_in_float32(bias: bool, x_grad: bool) -> None:
    for plain, quick in zip(*both(parts(bias=bias), x_grad), strict=True):
        assert (plain - quick).norm() <= 1e-6 * plain.norm()


def test_fast_in_bfloat16_is_within_its_rounding_and_gives_float32_gradients() -> None:
    """Measured: outputs and gradients of both paths lie within 4e-3 of the float32 ones' norm (2⁻⁸ = 3.9e-3)."""
    p = parts(torch.bfloat16)
    exact = both({k: v.float() for k, v in p.items()})[0]
    for path in both(p):
        assert path[1].dtype == path[2].dtype == torch.float32
        for true, found in zip(exact, path, strict=True):
            assert (true - found.float()).norm() <= 8e-3 * true.norm()


def test_the_weight_is_asked_for_again_and_not_kept() -> None:
    p, calls = parts(), []
    kept: list[torch.Tensor] = []

    def weight() -> torch.Tensor:
        calls.append(1)
        return p["w"].clone()

    x = p["x"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = one(x, weight, p["bias"], p["a"].requires_grad_(), p["b"].requires_grad_())
    assert len(calls) == 1
    assert all(t.shape != p["w"].shape for t in kept)
    assert sum(t.numel() == x.numel() for t in kept) == 1
    y.sum().backward()
    assert len(calls) == 2


def test_dropout_keeps_the_mean_and_its_gradient_matches_its_mask() -> None:
    p = parts()
    x = torch.ones(4000, IN)
    a, b = p["a"].clone().requires_grad_(), p["b"].clone().requires_grad_()
    y = one(x, lambda: torch.zeros(OUT, IN), None, a, b, 0.25)
    whole = SCALE * p["b"] @ p["a"] @ torch.ones(IN)
    assert (y.mean(0) - whole).norm() < 0.05 * whole.norm()
    # the update is bilinear in the dropped input: its own value is ⟨grad, parameter⟩
    y.sum().backward()
    assert torch.allclose((a.grad * a).sum(), y.sum(), rtol=1e-4)
    assert torch.allclose((b.grad * b).sum(), y.sum(), rtol=1e-4)
    x = p["x"].requires_grad_()
    y = one(x, lambda: torch.zeros(OUT, IN), None, a, b, 0.25)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose((gradient * x).sum(), y.sum(), rtol=1e-4)


def test_checkpointed_gradients_are_the_same() -> None:
    p = parts()
    grads = []
    for wrap in (False, True):
        x, a, b = (p[k].clone().requires_grad_() for k in ("x", "a", "b"))
        torch.manual_seed(1)
        run = lambda x: one(x, lambda: p["w"], p["bias"], a, b, 0.5).sin()  # noqa: B023, E731
        (checkpoint(run, x, use_reentrant=False) if wrap else run(x)).sum().backward()
        grads.append((x.grad, a.grad, b.grad))
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_shapes_alone_are_enough(where: str) -> None:
    p = parts()
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        made = {k: torch.empty(v.shape, device="meta" if where == "meta" else "cpu") for k, v in p.items()}
        a, b = made["a"].requires_grad_(), made["b"].requires_grad_()
        one(made["x"].requires_grad_(), lambda: made["w"], made["bias"], a, b, 0.1).sum().backward()
    assert a.grad.shape == p["a"].shape
    assert b.grad.shape == p["b"].shape


@pytest.mark.parametrize("x_grad", [True, False])
def test_layers_of_one_input_share_a_node(x_grad: bool) -> None:
    """Of three layers two are tuned, with ranks and scales of their own; each gradient is the plain graph's."""
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, IN, generator=g) / IN**0.5 for n in (OUT, 24, 8)]
    trained = [[torch.randn(r, IN, generator=g), torch.randn(n, r, generator=g)] for r, n in ((4, OUT), (2, 8))]
    found = []
    for quick in (False, True):
        x = torch.randn(3, 7, IN, generator=torch.Generator().manual_seed(1)).requires_grad_(x_grad)
        (a, b), (c, d) = ([t.clone().requires_grad_() for t in pair] for pair in trained)
        if quick:
            layers = [Factors(lambda dtype, w=w: w, None) for w in weights]
            layers[0] = Factors(layers[0].weight, None, a, b, 2.0)
            layers[2] = Factors(layers[2].weight, None, c, d, 0.5)
            out = fast(x, *layers)
        else:
            plain = [lambda v, w=w: F.linear(v, w) for w in weights]
            out = reference(x, plain[0], a, b, 2.0), plain[1](x), reference(x, plain[2], c, d, 0.5)
        sum((y.sin() * y).sum() for y in out).backward()
        found.append([*(y.detach() for y in out), a.grad, b.grad, c.grad, d.grad, *([x.grad] if x_grad else [])])
    for plain, quick in zip(*found, strict=True):
        assert (plain - quick).norm() <= 1e-6 * plain.norm()


def test_layers_without_updates_or_with_gradients_of_their_own_run_alone() -> None:
    x = torch.randn(5, IN)
    frozen, free = (torch.nn.Linear(IN, OUT) for _ in range(2))
    frozen.requires_grad_(False)
    assert all(torch.equal(y, layer(x)) for layer in (frozen, free) for y in together(x, [layer]))
