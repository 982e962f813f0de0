"""What the parts must agree on before anything is trained: lengths and vocabularies."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftrun import assemble
from ftrun.errors import UserError
from tests.families import save_tiny
from tests.jobs import tiny_job


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_rows_beyond_the_table_of_positions_are_refused(family: str, tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "seq_len=257", family=family)
    with pytest.raises(UserError, match=r"seq_len=257: the model has 256 positions.*seq_len=256"):
        assemble.sketch(job, tmp_path / "cache", print)


def test_rotary_positions_go_on_with_a_warning(tmp_path: Path) -> None:
    said: list[str] = []
    assemble.sketch(tiny_job(tmp_path, "seq_len=257"), tmp_path / "cache", said.append)
    assert [line for line in said if "made for 256 positions" in line]
    said.clear()
    assemble.sketch(tiny_job(tmp_path, "seq_len=256"), tmp_path / "cache", said.append)
    assert not said


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    """261 tokens in the tokenizer; what counts is whether the rows use those beyond the model's."""
    save_tiny("llama", tmp_path / "llama", vocab_size=260)
    job = tiny_job(tmp_path)
    assert len(assemble.rows(job, assemble.sketch(job, tmp_path / "c", print), tmp_path / "c", print).train)
    save_tiny("llama", tmp_path / "small", vocab_size=100)
    job = tiny_job(tmp_path, family="small")
    with pytest.raises(UserError, match=r"rows.jsonl:1?\d+: found token \d+ .*vocabulary ends at 99"):
        assemble.rows(job, assemble.sketch(job, tmp_path / "c", print), tmp_path / "c", print)
