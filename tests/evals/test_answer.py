"""An answer ends where the model's positions end."""

from __future__ import annotations

import pytest

from ftrun.data.rows import in_memory
from ftrun.errors import UserError
from ftrun.evals.answer import answer, prompt_ids
from tests.families import tiny_model, tiny_tokenizer


def test_an_answer_ends_with_the_table_of_positions() -> None:
    model = tiny_model("gpt2")
    model.table_of_positions = 256
    assert isinstance(answer(model, tiny_tokenizer(), list(range(5, 255)), 50), str)
    with pytest.raises(UserError, match=r"eval\.prompt: 256 tokens; the model has 256 positions"):
        answer(model, tiny_tokenizer(), [7] * 256, 50)


@pytest.mark.parametrize("prefix", [(), (900, 901)])
def test_a_rows_prompt_is_what_comes_before_its_answer_or_a_plain_texts_beginning(prefix: tuple[int, ...]) -> None:
    def prompt(learn: list[int]) -> list[int]:
        return prompt_ids(None, tiny_tokenizer(), in_memory([(list(range(10, 10 + len(learn))), learn)], prefix))

    assert prompt([0, 0, 0, 1, 1]) == [10, 11, 12]
    assert prompt([1] * 6) == [10, 11, 12]
    assert prompt([1]) == [10]
    assert prompt([1] * 100) == list(range(10, 26))
