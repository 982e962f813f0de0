"""What every test runs under: a cache of its own (one for all workers), no network, few threads."""

from __future__ import annotations

import os
import tempfile

import pytest

# before anything reads them: torch, transformers and wandb look at their first import
_CACHE = tempfile.TemporaryDirectory(prefix="ftrun-tests-") if "FTRUN_CACHE" not in os.environ else None
if _CACHE is not None:
    os.environ["FTRUN_CACHE"] = _CACHE.name
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    """Two threads at most, once a test has imported torch; light tests stay light."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() > 2:
        torch.set_num_threads(2)
