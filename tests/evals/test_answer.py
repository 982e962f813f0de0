"""An answer ends where the model's positions end."""

from __future__ import annotations

import pytest

from ftrun.errors import UserError
from ftrun.evals.answer import answer
from tests.families import tiny_model, tiny_tokenizer


def test_an_answer_ends_with_the_table_of_positions() -> None:
    model = tiny_model("gpt2")
    model.table_of_positions = 256
    assert isinstance(answer(model, tiny_tokenizer(), list(range(5, 255)), 50), str)
    with pytest.raises(UserError, match=r"eval\.prompt: 256 tokens; the model has 256 positions"):
        answer(model, tiny_tokenizer(), [7] * 256, 50)
