"""The measured peak on the CPU: of this process, since the last reset."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from ftrun.kernels import pages
from ftrun.memory import measure
from ftrun.memory.measure import Meter

SIZE = 200_000_000  # bytes: above what an allocator keeps for itself


def block() -> torch.Tensor:
    """In pages of its own: a run in this process may have told the C library to keep those of freed tensors."""
    return pages.empty((SIZE // 4,), torch.float32).fill_(1)


def test_a_peak_between_two_readings_is_seen_and_reset() -> None:
    meter = Meter("cpu")
    before, _ = meter.current()
    held = block()
    during, _ = meter.current()
    del held
    after, peak = meter.current()
    assert during - before == pytest.approx(SIZE, rel=0.1)
    assert after - before < SIZE / 2
    assert peak - before == pytest.approx(SIZE, rel=0.1)
    meter.reset_peak()
    assert meter.current()[1] - before < SIZE / 2


def test_without_the_kernels_reset_the_peak_is_never_invented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The lifetime peak of before the reset must not be reported; a rise above it must."""
    before = measure.resident()
    held = block()
    lifetime = measure.resident()
    del held
    for name in ("statm", "status"):
        (tmp_path / name).write_bytes((Path("/proc/self") / name).read_bytes())
    (tmp_path / "clear_refs").mkdir()  # cannot be written
    (tmp_path / "status").write_text(f"VmHWM: {lifetime // 1024} kB\n")
    monkeypatch.setattr(measure, "_PROC", tmp_path)
    meter = Meter("cpu")
    assert "sampled" in meter.measures
    assert meter.current()[1] - before < SIZE / 2
    (tmp_path / "status").write_text(f"VmHWM: {(lifetime + SIZE) // 1024} kB\n")
    assert meter.current()[1] - lifetime == pytest.approx(SIZE, rel=0.1)


def test_a_reading_takes_less_than_a_millisecond() -> None:
    meter = Meter("cpu")
    begun = time.process_time()
    for _ in range(200):
        meter.current()
    assert (time.process_time() - begun) / 200 < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_live_tensors_are_counted() -> None:
    meter = Meter("cuda")
    before, _ = meter.current()
    held = torch.ones(SIZE // 4, device="cuda")
    assert meter.current()[0] - before == pytest.approx(SIZE, rel=0.02)
    del held
    assert meter.current()[0] == before
    assert meter.current()[1] - before == pytest.approx(SIZE, rel=0.02)
