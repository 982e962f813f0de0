"""The GGUF reader against the `gguf` package's own, and against damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize

from ftrun.errors import UserError
from ftrun.models.sources.gguf import GGUF


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small file with every kind of value, and the three types of tensor of the embedded default."""
    draw = np.random.default_rng(0)
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.rate", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", "naïve")
    writer.add_array("a.names", ["one", "zwei", ""])
    writer.add_array("a.ids", [3, 1, 2])
    writer.add_tensor("norm.weight", draw.standard_normal(32, np.float32))
    for kind in (GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0):
        blocks = quantize(draw.standard_normal((6, 64), np.float32), kind)
        writer.add_tensor(f"{kind.name}.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf"


def test_equals_the_packages_reader(path: Path) -> None:
    ours, theirs = GGUF(path), GGUFReader(path)
    assert ours.facts == {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    tensors = dict(ours.tensors())
    assert list(tensors) == ["norm.weight", "Q4_1.weight", "Q8_0.weight"]
    for tensor in theirs.tensors:
        want = dequantize(tensor.data, tensor.tensor_type)
        assert tensors[tensor.name].dtype == np.float32
        assert np.array_equal(tensors[tensor.name], want)
        assert tensors[tensor.name].shape == tuple(tensor.shape[::-1])


@pytest.mark.parametrize("content", [b"GGUF\x02\0\0\0" + b"\0" * 16, b"GGUF", b"not a GGUF file, but long enough"])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.gguf: (no GGUF file|damaged)"):
        GGUF(tmp_path / "x.gguf")


def test_a_file_cut_in_its_header_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        GGUF(path)
