"""The shapes of rows, recognised or mapped, and what is said of those that are none."""

from __future__ import annotations

import pytest

from ftrun.data.options import DataOptions
from ftrun.data.record import RowError
from ftrun.data.shapes import Chat, Text, read
from ftrun.errors import UserError

ASKED = [("user", "Q"), ("assistant", "A")]


def turns(row, **options):
    shape = read(row, DataOptions(**options))
    assert isinstance(shape, Chat)
    return [(m["role"], m["content"]) for m in shape.messages]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"messages": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'},
        {"messages": [{"role": "User", "content": [{"type": "text", "text": "Q"}]}, {"role": "model", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"prompt": "Q", "completion": "A"},
        {"prompt": "Q", "response": "A"},
        {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
        {"instruction": "Q", "output": "A"},
        {"instruction": "Q", "input": "", "output": "A", "text": "all of it"},
        {"instruction": "", "input": "Q", "output": "A"},
        {"input": "Q", "output": "A"},
        {"question": "Q", "answer": "A", "id": 7},
        {"question": "Q", "answer": "A", "text": None, "messages": None},
    ],
)
def test_shapes_recognised(row):
    assert turns(row) == ASKED


def test_text_is_text():
    assert read({"text": "words"}, DataOptions()) == Text("words")


def test_instruction_with_input_and_history():
    row = {"instruction": "Add", "input": "1 2", "output": "3", "history": [["a", "b"]], "system": "Sums."}
    expected = [("system", "Sums."), ("user", "a"), ("assistant", "b"), ("user", "Add\n\n1 2"), ("assistant", "3")]
    assert turns(row) == expected


def test_system_option_stands_where_a_row_brings_none():
    assert turns({"question": "Q", "answer": "A"}, system="S") == [("system", "S"), *ASKED]
    assert turns({"question": "Q", "answer": "A", "system": "own"}, system="S")[0] == ("system", "own")
    row = {"messages": [{"role": "system", "content": "own"}, {"role": "assistant", "content": "A"}]}
    assert turns(row, system="S")[0] == ("system", "own")


def test_columns_mapped():
    row = {"q": "Q", "a": "A", "text": "other"}
    assert turns(row, columns={"prompt": "q", "completion": "a"}) == ASKED
    with pytest.raises(RowError, match=r"completion: found no column 'aa' among q, a, text. Did you mean 'a'"):
        read(row, DataOptions(columns={"prompt": "q", "completion": "aa"}))
    with pytest.raises(UserError, match=r"data.columns: the column 'promt' is unknown. Did you mean 'prompt'"):
        DataOptions(columns={"promt": "q"})


def test_only_the_completion_of_a_prompt_with_turns_is_learnt():
    turns_before = [{"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b"), ("user", "c")]]
    row = {"prompt": turns_before, "completion": [{"role": "assistant", "content": "d"}]}
    for loss_on in ("assistant", "completion"):
        assert read(row, DataOptions(loss_on=loss_on)).learn == [False, False, False, True]
    row["messages"] = None
    assert read(row, DataOptions(system="S")).learn == [False] * 4 + [True]


def test_sharegpt_tools():
    calls = [
        {"from": "human", "value": "1+1"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "2"},
    ]
    shape = read({"conversations": calls, "tools": '[{"name": "add"}]'}, DataOptions())
    assert [m["role"] for m in shape.messages] == ["user", "assistant", "tool", "assistant"]
    assert shape.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert shape.learn == [False, True, False, True]
    assert shape.tools == [{"name": "add"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"foo": 1, "bar": 2}, r"found the columns foo, bar, expected messages \| .*data.columns=\{prompt: YOURS"),
        ({}, "found the columns none, expected messages"),
        (
            {"prompt": "c"},
            r"found the columns prompt, expected completion or response beside prompt\. Rows hold messages",
        ),
        (
            {"question": "Q", "anwser": "A"},
            "found the columns question, anwser, expected answer or response beside question",
        ),
        ({f"c{i}": 1 for i in range(20_000)}, r"c11, … \(20,000 in all\), expected"),
        ({"prompt": 10**5000, "completion": "A"}, "prompt: found a number of thousands of digits, expected text"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "found the columns prompt, chosen, rejected"),
        ({"prompt": 3, "completion": "A"}, r"prompt: found a number \(3\), expected text, or a list of messages"),
        ({"prompt": "Q", "completion": 42}, r"completion: found a number \(42\), expected text, or a list"),
        ({"question": "Q", "answer": 42}, r"answer: found a number \(42\), expected text"),
        ({"question": ["Q"], "answer": "A"}, "question: found a list, expected text"),
        ({"question": "Q\0", "answer": "A"}, "question: found a NUL character at position 2"),
        ({"question": "Q\ud800", "answer": "A"}, "question: found half a character at position 2"),
        ({"messages": []}, "found no messages"),
        ({"messages": "hello"}, "messages: found text that is no JSON"),
        ({"messages": "[" * 100_000}, "messages: found text that is no JSON"),
        ({"messages": {"role": "user"}}, "messages: found an object, expected a list of messages"),
        ({"messages": ["hi"]}, r"messages\[0\]: found text, expected a message"),
        ({"messages": [{"role": "asistant", "content": "A"}]}, "found the role 'asistant'.*Did you mean 'assistant'"),
        ({"messages": [{"content": "A"}]}, r"messages\[0\]: found no role, expected system, user, assistant or tool"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: found no content, expected text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of the kind image, expected text"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\].content: found a number \(5\), expected text"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": 3}, "tools: found a number, expected a list"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, r"history\[0\]: found text, expected a list"),
    ],
)
def test_rows_that_are_none(row, message):
    with pytest.raises(RowError, match=message):
        read(row, DataOptions())
