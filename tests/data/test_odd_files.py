"""Files and paths that no one writes on purpose: each is said in words, and nothing of a file is dropped."""

from __future__ import annotations

import os

import pytest

from ftrun.data.formats import json as json_format
from ftrun.data.formats import jsonl
from ftrun.data.sources import check_sources
from ftrun.errors import UserError
from tests.data.test_formats import read, written

BIG = '{"question": ' + "9" * 5000 + ', "answer": "A"}'


def test_a_number_of_thousands_of_digits(tmp_path):
    (found,) = read(jsonl, written(tmp_path / "a.jsonl", BIG))
    assert "thousands of digits" in found[1].why
    with pytest.raises(UserError, match=r"a.json:1: broken JSON .*thousands of digits"):
        read(json_format, written(tmp_path / "a.json", f"[{BIG}]"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}]\n[{"text": "b"}]', r"a.json:2: .*something follows the list"),
        ('[{"text": "a"}] garbage', r"a.json:1: .*column 17 .*something follows the list"),
        ('[{"text": "a"} {"text": "b"}]', r"a.json:1: .*a comma is missing"),
        ('[{"text": "a"},, {"text": "b"}]', "broken JSON"),
        ('[{"text": "a"}', "the list is not closed"),
    ],
)
def test_nothing_of_a_json_file_is_dropped(content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(json_format, written(tmp_path / "a.json", content))


def test_paths_that_are_no_files(tmp_path):
    long, dangling, loop, pipe = (tmp_path / name for name in ("x" * 300, "dangling", "loop", "pipe"))
    dangling.symlink_to("nowhere")
    loop.symlink_to("loop")
    os.mkfifo(pipe)
    said = {
        long: "no such file",
        dangling: "a link that leads to no file",
        loop: "a link that leads to no",
        pipe: "pipe",
    }
    for path, words in said.items():
        with pytest.raises(UserError, match=words) as raised:
            jsonl.check(jsonl.Options(path=str(path)))
        assert "Did you mean" not in str(raised.value)
    with pytest.raises(UserError, match="found a pipe or a device"):
        jsonl.check(jsonl.Options(path="/dev/null"))


def test_a_missing_held_out_path_is_named_by_its_own_key(tmp_path):
    for name in ("rows.jsonl", "hold.txt", "hold2.jsonl"):
        written(tmp_path / name, "{}")
    options = jsonl.Options(path=str(tmp_path / "rows.jsonl"), held_out_path=str(tmp_path / "hold.jsonl"))
    with pytest.raises(UserError, match=r"^data.held_out_path=.*Did you mean '.*hold2.jsonl'"):
        check_sources(jsonl, options)
