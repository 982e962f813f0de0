"""On fake tensors a step takes CUDA's operators, and what their kernels use within themselves is counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ftrun.memory.cuda import CudaOps, flash_backward, transient, workspaces
from ftrun.memory.pool import MIB, CachingAllocator
from ftrun.memory.track import Tracker

N = 1 << 20


def tracked(rounding: int = 512) -> Tracker:
    return Tracker(rounding, transient=transient)


def test_dropout_keeps_a_mask_of_a_byte_an_element() -> None:
    with FakeTensorMode(), tracked() as tracker, CudaOps():
        x = torch.empty(N, dtype=torch.bfloat16, requires_grad=True)
        y = F.dropout(x, 0.1)
        assert tracker.now.total == 2 * N + 2 * N + N
        assert y.requires_grad


def test_a_half_softmax_in_float32_makes_no_copy_of_its_input() -> None:
    with FakeTensorMode(), tracked() as tracker, CudaOps():
        x = torch.empty(1024, 1024, dtype=torch.bfloat16, requires_grad=True)
        y = F.softmax(x, dim=-1, dtype=torch.float32)
        assert y.dtype is torch.float32
        assert tracker.peak.peak.total == 2 * N + 4 * N


def test_the_backward_pass_of_softmax_makes_a_product_of_its_own() -> None:
    with FakeTensorMode(), tracked() as tracker, CudaOps():
        x = torch.empty(1024, 1024, requires_grad=True)
        y = torch.softmax(x, -1)
        tracker.restart()
        y.backward(torch.empty(1024, 1024))
        assert tracker.peak.peak.total == 5 * 4 * N  # x, y, its gradient, the product, x's gradient


def test_grouped_heads_have_flash_attention_gather_every_query_heads_gradient() -> None:
    q, kv = (2, 8, 256, 64), 2
    with FakeTensorMode(), tracked() as tracker, CudaOps((8, 0)):
        tensors = [torch.empty(2, h, 256, 64, dtype=torch.bfloat16, requires_grad=True) for h in (8, kv, kv)]
        out = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
        before = tracker.now.total
        grad = torch.empty_like(out)
        tracker.restart()
        out.backward(grad)
        gradients = sum(t.nbytes for t in tensors)
        extra = flash_backward(q, kv, 256, 2)
        assert tracker.peak.peak.total == before + out.nbytes + gradients + sum(extra)
    assert extra == [4 * 2 * 8 * 256, 4 * 2 * 256 * 8 * 64, 2 * 2 * 256 * 8 * 64, 2 * 2 * 256 * 8 * 64]


def test_a_card_without_flash_attention_takes_the_memory_efficient_kernel() -> None:
    with FakeTensorMode(), tracked(), CudaOps((7, 5)):
        tensors = [torch.empty(1, 4, 128, 64, dtype=torch.float16, requires_grad=True) for _ in range(3)]
        out = F.scaled_dot_product_attention(*tensors, is_causal=True)
        assert "EfficientAttention" in type(out.grad_fn).__name__
        out.sum().backward()


def test_what_is_computed_again_takes_the_same_operators() -> None:
    def block(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x * 2, 0.1).sum()

    with FakeTensorMode(), tracked(), CudaOps():
        x = torch.empty(64, requires_grad=True)
        checkpoint(block, x, use_reentrant=False).backward()
        assert x.grad is not None


def test_autocast_takes_cudas_list_of_float32_operators() -> None:
    with FakeTensorMode(), tracked(), CudaOps(), torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(8, 8, dtype=torch.bfloat16)
        assert F.layer_norm(x, (8,), torch.empty(8), torch.empty(8)).dtype is torch.float32
        assert torch.softmax(x, -1).dtype is torch.float32


@pytest.mark.parametrize(
    ("capability", "biased", "expected"), [((8, 0), False, [8.125]), ((7, 5), True, [8.125, 1]), ((9, 0), False, [32])]
)
def test_workspaces(capability: tuple[int, int], biased: bool, expected: list[float]) -> None:
    assert workspaces(capability, biased) == [size * MIB for size in expected]


def test_the_tracker_counts_blocks_of_the_pool_and_gives_them_back() -> None:
    pool = CachingAllocator()
    with FakeTensorMode(), Tracker(512, pool=pool) as tracker:
        x = torch.empty(11 * MIB, dtype=torch.uint8)
        assert tracker.now.total == pool.allocated == 12 * MIB  # the last MiB is not split off
        del x
        assert tracker.now.total == pool.allocated == 0
        tracker.hold(100)
        assert tracker.now.total == pool.allocated == 512
    assert pool.reserved == 14 * MIB


def test_the_loss_may_hold_its_logits_in_float32() -> None:
    logits = torch.empty(512, 1000, dtype=torch.bfloat16)
    assert list(transient(torch.ops.ftrun.cross_entropy_.default, (logits,), {}, None)) == [4 * 512 * 1000]
