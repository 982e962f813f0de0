"""What `ftrun data` shows."""

from __future__ import annotations

import io
import json

from rich.console import Console

from ftrun.data.show import data_report, render
from tests.data import small


def rows():
    made = [{"question": f"Q{i} [red]", "answer": "a" * (1 + i % 7 * 9)} for i in range(40)]
    return [*made, {"question": "Q", "answer": ""}, {"question": 3, "answer": "x"}]


def test_the_report_is_json_and_true(corpus):
    tokenizer = small.byte_level(small.CHATML, "<|im_end|>")
    made = corpus(rows(), tokenizer, bad_rows="skip", held_out=4, prefix=(1000, 1001))
    report = json.loads(json.dumps(data_report(made, tokenizer, 3)))
    assert len(report["rows"]) == 3
    first = report["rows"][0]
    assert first["tokens"] == len(first["ids"]) == len(first["texts"]) == len(first["learnt"])
    assert first["supervised"] == sum(first["learnt"])
    assert first["texts"][:2] == ["<prompt 0>", "<prompt 1>"]
    assert first["pieces"][-1]["learnt"]
    assert first["pieces"][-1]["text"].endswith("<|im_end|>")
    assert sum(b["rows"] for b in report["lengths"]["histogram"]) == report["counts"]["train"] == 36
    assert report["lengths"]["max"] == report["lengths"]["histogram"][-1]["to"]
    assert report["counts"]["bad"] == report["counts"]["nothing_to_learn"] == 1
    assert {e["what"] for e in report["left_out"]} == {"bad", "nothing_to_learn"}
    assert 0 < report["supervised_share"] < 1


def test_the_rendering_marks_without_colour(corpus):
    tokenizer = small.byte_level(small.CHATML, "<|im_end|>")
    made = corpus(rows(), tokenizer, bad_rows="skip")
    out = io.StringIO()
    render(data_report(made, tokenizer, 2), Console(file=out, width=100))
    shown = out.getvalue()
    assert "⟦a<|im_end|>⟧" in shown
    assert "Q0 [red]" in shown  # no markup is read out of data
    assert "rows with nothing to learn, left out" in shown
    assert "question: found a number (3), expected text" in shown
    assert "\x1b[" not in shown
    coloured = io.StringIO()
    render(data_report(made, tokenizer, 1), Console(file=coloured, width=100, force_terminal=True))
    assert "\x1b[1;32m" in coloured.getvalue()


def test_rows_of_one_length(corpus):
    tokenizer = small.byte_level(small.CHATML, "<|im_end|>")
    report = data_report(corpus([{"question": "Q", "answer": "A"}], tokenizer), tokenizer, 5)
    assert [b["rows"] for b in report["lengths"]["histogram"]] == [1]
