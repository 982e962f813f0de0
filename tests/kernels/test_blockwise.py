"""Quantised bytes against bitsandbytes' own, and dense weights against plain torch."""

import bitsandbytes.functional as bnb
import pytest
import torch

from ftrun.kernels import blockwise

KINDS = ("nf4", "fp4")
# whole blocks in a row; blocks that cross rows; no whole number of blocks; odd rows; an odd number of values
SHAPES = [(64, 128), (64, 96), (100, 50), (30, 14), (30, 7), (3, 5), (4, 48, 32)]


def weight(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [64, 256])
def test_bytes_and_constants_are_those_of_bitsandbytes(kind, shape, dtype, block):
    w = weight(shape, dtype)
    theirs, state = bnb.quantize_4bit(w, blocksize=block, quant_type=kind, compress_statistics=False)
    packed, absmax = blockwise.quantise_4bit(w, kind, block)
    assert torch.equal(packed, theirs)
    assert torch.equal(absmax, state.absmax)
    _, nested = bnb.quantize_4bit(w, blocksize=block, quant_type=kind, compress_statistics=True)
    for ours, expected in zip(
        blockwise.quantise_constants(absmax), (nested.absmax, nested.state2.absmax, nested.offset), strict=True
    ):
        assert torch.equal(ours, expected)


def test_chunks_leave_no_trace(monkeypatch):
    w = weight((96, 512), torch.bfloat16)
    whole, rows = blockwise.quantise_4bit(w, "nf4", 64), blockwise.quantise_int8(w)
    monkeypatch.setattr(blockwise, "_CHUNK", 4096)
    assert all(torch.equal(a, b) for a, b in zip(whole, blockwise.quantise_4bit(w, "nf4", 64), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(rows, blockwise.quantise_int8(w), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [32, 64, 1024])
def test_the_dense_weight_equals_plain_torch(kind, shape, dtype, block):
    packed, absmax = blockwise.quantise_4bit(weight(shape, dtype), kind, block)
    fast = blockwise.dequantise_4bit(packed, absmax, kind, block, shape, dtype)
    assert torch.equal(fast, blockwise.reference_dequantise_4bit(packed, absmax, kind, block, shape, dtype))
    assert fast.shape == shape
    assert fast.dtype == dtype


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_torch_quantises_to_the_same_bytes(shape):
    w = weight(shape, torch.float32)
    fast, slow = blockwise.quantise_4bit(w, "nf4", 64), blockwise.reference_quantise_4bit(w, "nf4", 64)
    assert torch.equal(fast[0], slow[0])
    assert torch.equal(fast[1], slow[1])


def test_the_dense_weight_equals_bitsandbytes_where_rows_hold_whole_blocks():
    w = weight((64, 256), torch.bfloat16)
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    packed, absmax = blockwise.quantise_4bit(w, "nf4", 64)
    constants = blockwise.dequantise_constants(*blockwise.quantise_constants(absmax))
    ours = blockwise.dequantise_4bit(packed, constants, "nf4", 64, (64, 256), torch.bfloat16)
    assert torch.equal(ours, bnb.dequantize_4bit(theirs, state))


def test_code_points_are_those_of_bitsandbytes():
    for kind in KINDS:
        assert torch.equal(torch.tensor(blockwise.CODES[kind]), bnb.get_4bit_type(kind, device="cpu"))


@pytest.mark.parametrize("shape", [(16, 40), (3, 8, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_rows(shape, dtype):
    w = weight(shape, dtype)
    w.view(-1, shape[-1])[1] = 0
    packed, absmax = blockwise.quantise_int8(w)
    dense = blockwise.dequantise_int8(packed, absmax, torch.float32)
    assert torch.equal(dense.view(-1, shape[-1])[1], torch.zeros(shape[-1]))
    # half a step of 1/127 of the row's largest magnitude
    assert ((dense - w.float()).abs() <= absmax.unsqueeze(-1) / 254 * 1.0001).all()
    assert torch.equal(blockwise.dequantise_int8(packed, absmax, torch.bfloat16), dense.bfloat16())


def test_int8_bytes_are_those_of_bitsandbytes():
    w = weight((48, 64), torch.float32)
    theirs, magnitudes, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(w)
    packed, absmax = blockwise.quantise_int8(w)
    assert torch.equal(packed, theirs)
    assert torch.equal(absmax, magnitudes)
