"""What every test runs under: a cache of its own (one for all workers), no network, few threads."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest

# a shell's background job ignores it, and so would every process that the tests start and interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# before anything reads them: torch, transformers and wandb look at their first import
_CACHE = tempfile.TemporaryDirectory(prefix="ftrun-tests-") if "FTRUN_CACHE" not in os.environ else None
if _CACHE is not None:
    os.environ["FTRUN_CACHE"] = _CACHE.name
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", TOKENIZERS_PARALLELISM="false")
# a worker inherits what the process that started it has set: with two threads in each of two workers on two cores the
# tests wait for one another, and take up to ten times as long
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked few(N), N cases spread over all of them stay quick and the others are slow."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few") is not None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in cases.values():
        (count,) = found[0].get_closest_marker("few").args  # type: ignore[union-attr]
        quick = {number * len(found) // count for number in range(count)}
        for number, item in enumerate(found):
            if number not in quick:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    """Two threads at most, once a test has imported torch; light tests stay light."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() > 2:
        torch.set_num_threads(2)
