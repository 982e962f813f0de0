"""Fixtures of the data room's tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftrun.data.formats import jsonl
from ftrun.data.load import Corpus, load
from tests.data import small


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small.smollm2(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def corpus(tmp_path: Path, said: list[str]) -> Callable[..., Corpus]:
    """corpus(rows, tokenizer, seq_len=…, prefix=…, seed=…, **options): the rows by way of a .jsonl file."""

    def made(
        rows: list[dict[str, Any]] | str,
        tokenizer: Any,
        seq_len: int = 4096,
        prefix: tuple[int, ...] = (),
        seed: int = 0,
        **options: Any,
    ) -> Corpus:
        path = tmp_path / "rows.jsonl"
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        chosen = jsonl.Options(**{"path": str(path), "held_out": 0, **options})
        return load(jsonl, chosen, tokenizer, seq_len, prefix, seed, tmp_path / "cache", said.append)

    return made


def learnt_runs(rows: Any, i: int, tokenizer: Any) -> list[str]:
    """What is learnt of a row, a text a stretch."""
    return runs(rows.ids(i).tolist(), rows.learn(i).tolist(), tokenizer)


def runs(ids: list[int], learn: list[int], tokenizer: Any) -> list[str]:
    """The stretches of tokens that `learn` marks, decoded."""
    found: list[list[int]] = []
    before = 0
    for token, flag in zip(ids, learn, strict=True):
        if flag and not before:
            found.append([])
        if flag:
            found[-1].append(token)
        before = flag
    return [tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False) for run in found]
