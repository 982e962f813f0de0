"""What a rank that fails leaves for the launcher, which shows the earliest of several."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftrun.errors import RunFailed
from ftrun.tasks import rank


def test_the_rank_that_ran_out_of_memory_is_heard_and_not_the_one_that_waited_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both end in one second of the clock."""
    monkeypatch.setattr(rank.time, "time", lambda: 1000.5)
    asked: list[str] = []
    monkeypatch.setattr(rank, "Caller", lambda desk: SimpleNamespace(ask=lambda what, **given: asked.append(what)))
    monkeypatch.setattr(rank, "die_with_parent", lambda parent: None)
    words = []
    for error in (RuntimeError("Connection closed by peer"), RunFailed("out of memory in step 3")):

        def fail(run: Path, caller: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(rank, "work", fail)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
        assert rank.main(tmp_path, "desk") == RunFailed.exit_code
        words.append(json.loads((tmp_path / "error.json").read_text()))
    assert min(words, key=lambda word: int(word["timestamp"]))["message"] == "out of memory in step 3"
    assert asked == ["ended"]  # the second alone: a library's error may be the echo of another rank's end
