"""What counts as the answer in a text, and when two are the same: hand-made cases."""

from __future__ import annotations

from decimal import Decimal

import pytest

from ftrun.evals.exact import Exact, Question, chosen, equal, first_json, last_number, measure, question
from tests.families import tiny_tokenizer

NUMBERS = [
    ("She pays 3 + 4 = 7 dollars.\n#### 42", "42"),
    ("That makes $1,234.50.", "1234.50"),
    ("It fell by -3.5%", "-3.5"),
    ("about 20 %.", "20"),
    ("a − sign: −12", "-12"),
    ("1,2 and 3", "3"),
    ("1,234,567", "1234567"),
    ("the answer is .5", "0.5"),
    ("2e3", "2000"),
    ("in 2024.", "2024"),
    ("10-4", "4"),
    ("x1 has none", None),
    ("from 5-7", "7"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("no number", None),
    ("", None),
    ("so 18 eggs, 9 of which", "9"),
    ("3/4", "4"),
    ("10:30", "30"),
    ("\\boxed{17}", "17"),
    ("**5**", "5"),
    ("5 - 2", "2"),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("so #### 1,000", "#### 1000", True),
        ("7.0", "7", True),
        ("7.01", "7", False),
        ("none", "none", False),
        ("I think 70", "7", False),
    ],
)
def test_numbers_are_the_same_by_value(text: str, reference: str, same: bool) -> None:
    assert Exact("number").same(text, reference) is same


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ('Here: {"b": [1, 2], "a": 1.0} done', '{"a": 1, "b": [1, 2]}', True),
        ('{"a": [2, 1]}', '{"a": [1, 2]}', False),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": null}', '{"a": null}', True),
        ('{"a": "1"}', '{"a": 1}', False),
        ("{broken [1, 2.50]", "[1, 2.5]", True),
        ('{"a": 1', '{"a": 1}', False),
        ('```json\n{"x": {"y": []}}\n```', '{"x": {"y": []}}', True),
        ("no json", "no json", False),
        ("[]", "{}", False),
    ],
)
def test_json_by_value(text: str, reference: str, same: bool) -> None:
    assert Exact("json").same(text, reference) is same


def test_json_parts() -> None:
    assert first_json("a [1] and {}") == [1]
    assert first_json("[" * 100_000) is None
    assert equal({"a": Decimal("1.0")}, {"a": Decimal(1)})
    assert not equal({"a": 1}, {"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("pattern", "text", "reference", "same"),
    [
        (r"Answer: (\w)", "Why? Answer: B.", "Answer: B", True),
        (r"Answer: (\w)", "Answer: C", "Answer: B", False),
        (r"^[A-D]\b", "text\nB", "B", True),
        (r"yes|no", "well, no", "no way", True),
        (r"(a)?b", "b", "b", True),
        (r"yes|no", "maybe", "maybe", False),
    ],
)
def test_a_regular_expression(pattern: str, text: str, reference: str, same: bool) -> None:
    assert Exact("regex", pattern).same(text, reference) is same


def test_a_row_asks_up_to_its_last_learnt_passage() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("ask one ask two", add_special_tokens=False).input_ids
    learn = [0] * 4 + [1] * 3 + [0] * 5 + [1] * 3
    found = question(ids, learn, tokenizer)
    assert found == Question(ids[:12], "two")
    assert question(ids, [1] * len(ids), tokenizer) is None
    assert question(ids, [0] * len(ids), tokenizer) is None


def test_the_extractor_that_fits_is_found() -> None:
    def of(*texts: str) -> str | None:
        found = chosen([Question([5], text) for text in texts])
        return found and found.kind

    assert of(*['{"a": 1}'] * 3) == "json"
    assert of(*["#### 4"] * 9, "none") == "number"
    assert of("4", "four") is None
    assert of() is None


def test_answers_are_counted_whatever_the_order_they_are_written_in() -> None:
    asked = [Question([5] * n, f"#### {n}") for n in (3, 9, 1, 4)]
    seen: list[list[int]] = []

    def generate(prompts: list[list[int]]) -> list[str]:
        seen.extend([len(p) for p in prompts] for _ in (1,))
        assert all(p[:2] == [300, 301] for p in prompts)
        return [{3: "it is 3", 9: "it is 8", 1: "no", 4: "4."}[len(p) - 2] for p in prompts]

    found = measure(Exact("number"), asked, generate, prefix=(300, 301), rows_at_once=3)
    assert seen == [[11, 6, 5], [3]]
    shown = ["it is 3", "it is 8", "no"]
    assert found == {"rows": 4, "matched": 2, "share": 0.5, "answered": 3, "texts": shown}
