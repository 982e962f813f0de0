"""From files to rows: what is left out and why, windows, the split, the mix, and the cache."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from types import ModuleType

import numpy as np
import pytest

from ftrun.data import cache as store
from ftrun.data.formats import chatterbot, jsonl, mix, text
from ftrun.data.load import load
from ftrun.errors import UserError
from tests.data import small


@pytest.fixture
def tokenizer():
    return small.byte_level(small.CHATML, "<|im_end|>")


def asked(count, start=0):
    return [{"question": f"Q{i}", "answer": f"answer {i}"} for i in range(start, start + count)]


def test_bad_rows_stop_with_file_and_line(corpus, tokenizer):
    with pytest.raises(UserError, match=r"rows.jsonl:2: broken JSON at column 1 .*\(data.bad_rows=skip"):
        corpus('{"text": "a"}\nnot json\n', tokenizer)
    with pytest.raises(UserError, match=r"rows.jsonl:1: the file is empty"):
        corpus("", tokenizer)


def test_bad_rows_skipped_are_counted(corpus, tokenizer, said):
    lines = [json.dumps(row) for row in asked(5)]
    lines[1:1] = ["not json", '{"foo": 1}', '{"question": 1, "answer": "x"}']
    made = corpus("\n".join(lines), tokenizer, bad_rows="skip")
    assert made.counts["bad"] == 3
    assert made.counts["read"] == 8
    assert len(made.train) == 5
    assert [e["where"].rpartition(":")[2] for e in made.left_out] == ["2", "3", "4"]
    assert "3 rows that cannot be read left out; the first: " in said[0]


def test_no_rows_at_all(corpus, tokenizer):
    with pytest.raises(UserError, match=r"no row to train on: 1 read, 1 with nothing to learn .*none of the assistant"):
        corpus([{"messages": [{"role": "user", "content": "Q"}]}], tokenizer)


@pytest.mark.parametrize("prefix", [(), (400, 401, 402)])
def test_overlong(prefix, corpus, tokenizer):
    rows = [{"question": "Q", "answer": "a" * size} for size in (5, 40, 400)] + [{"question": "Q" * 99, "answer": "a"}]
    seq_len = 64 + len(prefix)
    cut = corpus(rows, tokenizer, seq_len, prefix)
    # the last has its answer beyond the cut
    assert cut.counts["truncated"] == 2
    assert cut.counts["nothing_to_learn"] == 1
    assert cut.train.lengths.max() == seq_len
    assert cut.train.learn(2)[-1] == 1
    assert tokenizer.eos_token_id not in cut.train.ids(2)[40:]
    dropped = corpus(rows, tokenizer, seq_len, prefix, overlong="drop")
    assert dropped.counts["overlong"] == 2
    assert len(dropped.train) == 2
    with pytest.raises(
        UserError, match=r"rows.jsonl:3: found \d+ tokens, seq_len leaves room for 64. Expected data.ov"
    ):
        corpus(rows, tokenizer, seq_len, prefix, overlong="error")


def test_prefix(corpus, tokenizer):
    prefix = (1000, 1001)
    plain, tuned = corpus(asked(3), tokenizer), corpus(asked(3), tokenizer, prefix=prefix)
    for i in range(3):
        assert tuned.train.ids(i).tolist() == [*prefix, *plain.train.ids(i).tolist()]
        assert tuned.train.learn(i).tolist() == [0, 0, *plain.train.learn(i).tolist()]
    assert (tuned.train.lengths == plain.train.lengths + 2).all()
    text_rows = corpus([{"text": "abc"}], tokenizer), corpus([{"text": "abc"}], tokenizer, prefix=prefix)
    # behind a prefix a text's first token has one to be predicted from
    assert [c.train.supervised[0] for c in text_rows] == [3, 4]
    with pytest.raises(UserError, match=r"seq_len=3: the prompt's 2 tokens leave 1 for a row, expected 2 or more"):
        corpus(asked(3), tokenizer, 3, prefix)


def test_text_rows_are_windows(corpus, tokenizer):
    words = "".join(chr(97 + i % 26) for i in range(100))
    made = corpus([{"text": words}, {"text": "short"}, {"text": " "}], tokenizer, 16)
    assert made.train.lengths.tolist() == [16] * 6 + [5, 6]
    assert made.counts["windows"] == 7
    assert made.counts["nothing_to_learn"] == 1
    joined = "".join(tokenizer.decode(made.train.ids(i)) for i in range(7))
    assert joined == words + "<|im_end|>"
    assert made.train.supervised.tolist() == [15] * 6 + [4, 5]
    assert corpus([{"text": words}, {"text": "short"}], tokenizer, 16, overlong="drop").counts["overlong"] == 1
    with pytest.raises(UserError, match=r"found 101 tokens"):
        corpus([{"text": words}], tokenizer, 16, overlong="error")


def test_text_files_are_one_document_each(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 50)
    tokenizer = small.byte_level(bos=True)
    contents = ["".join(f"line {i} of a\n" for i in range(40)), "another one\n"]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.txt").write_text(content)
    made = load(text, text.Options(path=str(tmp_path), held_out=0), tokenizer, 32, (), 0, tmp_path / "c", print)
    rows = [made.train.ids(i).tolist() for i in range(len(made.train))]
    assert all(row[0] == tokenizer.bos_token_id for row in rows)
    whole = tokenizer.decode([t for row in rows for t in row[1:]])
    assert whole == f"{contents[0]}</s>{contents[1]}</s>"
    assert {len(row) for row in rows[:-2]} == {32}


def test_more_held_out_than_trained_on_is_said(corpus, tokenizer, said):
    rows = [{"question": f"{i}?", "answer": f"{i}"} for i in range(10)]
    corpus(rows, tokenizer, held_out=4)
    assert not any("data.held_out" in text for text in said)
    corpus(rows, tokenizer, held_out=2)
    assert "warning: 2 held-out rows are too few to judge by" in said
    corpus([{"question": f"{i}?", "answer": f"{i}"} for i in range(40)], tokenizer, held_out=2)
    assert "warning: 2 held-out rows are too few to judge by; data.held_out=10 holds out ten" in said
    said.clear()
    corpus(rows, tokenizer, held_out=8)
    assert [t for t in said if "data.held_out" in t] == [
        "warning: data.held_out=8: 8 rows are held out, 2 are left to train on"
    ]


def test_held_out_by_seed(corpus, tokenizer):
    rows = asked(200)
    made = corpus(rows, tokenizer, held_out=0.1)
    again, other = corpus(rows, tokenizer, held_out=0.1), corpus(rows, tokenizer, held_out=0.1, seed=1)
    assert (len(made.train), len(made.held_out)) == (180, 20)

    def places(some):
        return {some.where(i) for i in range(len(some))}

    assert places(made.held_out) == places(again.held_out) != places(other.held_out)
    assert not places(made.train) & places(made.held_out)
    assert len(corpus(rows, tokenizer, held_out=7).held_out) == 7
    assert len(corpus(rows, tokenizer, held_out=0).held_out) == 0
    assert len(corpus(rows, tokenizer, held_out=0.5, held_out_most=9).held_out) == 9
    assert len(corpus(rows[:3], tokenizer, held_out=0.01).held_out) == 1
    assert len(corpus(rows[:1], tokenizer, held_out=0.05).held_out) == 0
    with pytest.raises(UserError, match=r"data.held_out=200: found 200 rows in all, expected fewer"):
        corpus(rows, tokenizer, held_out=200)
    with pytest.raises(UserError, match=r"data.held_out=1.5: expected a share below 1 or a whole number"):
        jsonl.Options(path="x", held_out=1.5)


def test_copies_stay_on_one_side(corpus, tokenizer):
    made = corpus(asked(50) * 4, tokenizer, held_out=0.2)
    assert made.counts["duplicates"] == 150
    sides = [{bytes(rows.ids(i)) for i in range(len(rows))} for rows in (made.train, made.held_out)]
    assert not sides[0] & sides[1]
    assert len(made.held_out) == 40


def test_held_out_file(corpus, tokenizer, tmp_path):
    other = tmp_path / "test.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in asked(4, 100)))
    made = corpus(asked(10), tokenizer, held_out_path=str(other), held_out=0.5)
    assert (len(made.train), len(made.held_out)) == (10, 4)
    assert made.held_out.where(3).endswith("test.jsonl:4")


def test_limit(corpus, tokenizer):
    made = corpus(asked(20), tokenizer, limit=6)
    assert [made.train.where(i).rpartition(":")[2] for i in range(len(made.train))] == list("123456")


def mixed(tmp_path, tokenizer, sources, seed=0, **options):
    entries = []
    for i, (count, weight) in enumerate(sources):
        path = tmp_path / f"{i}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in asked(count, 1000 * i)))
        entries.append({"path": str(path)} | ({"weight": weight} if weight else {}))
    chosen = mix.Options(sources=entries, **{"held_out": 0, **options})
    return load(mix, chosen, tokenizer, 128, (), seed, tmp_path / "cache", print)


@pytest.mark.parametrize(
    ("sources", "until", "expected"),
    [
        ([(30, None), (10, None)], "all", [30, 10]),
        ([(30, 1), (10, 1)], "all", [30, 30]),
        ([(30, 1), (10, 1)], "first", [10, 10]),
        ([(30, 2), (30, 1)], "all", [60, 30]),
        ([(30, 2), (30, None)], "first", [30, 15]),
        ([(10, 0.7), (10, 0.3)], "all", [23, 10]),
    ],
)
def test_mix_shares(sources, until, expected, tmp_path, tokenizer):
    made = mixed(tmp_path, tokenizer, sources, until=until)
    assert [source["rows"] for source in made.sources] == expected
    seen = [made.train.where(i) for i in range(len(made.train))]
    # no row twice more than another of its source
    for i in range(2):
        times = [seen.count(w) for w in {w for w in seen if f"{i}.jsonl" in w}]
        assert max(times) - min(times) <= 1


def test_mix_holds_out_before_it_repeats(tmp_path, tokenizer):
    made = mixed(tmp_path, tokenizer, [(40, 1), (10, 1)], held_out=0.2)
    held = {made.held_out.where(i) for i in range(len(made.held_out))}
    assert len(held) == 10
    assert not held & {made.train.where(i) for i in range(len(made.train))}
    again = mixed(tmp_path, tokenizer, [(40, 1), (10, 1)], held_out=0.2)
    assert (made.train.row == again.train.row).all()


def folders(tmp_path):
    return sorted((tmp_path / "cache" / "data").iterdir())


def test_the_cache_is_by_content(corpus, tokenizer, tmp_path, monkeypatch):
    corpus(asked(5), tokenizer)
    assert len(folders(tmp_path)) == 1
    monkeypatch.setattr(jsonl, "lines", None)  # nothing is read again
    again = corpus(asked(5), tokenizer, held_out=0.3, seed=9)
    assert len(again.train) + len(again.held_out) == 5
    monkeypatch.undo()
    corpus(asked(6), tokenizer)
    corpus(asked(5), tokenizer, loss_on="all")
    corpus(asked(5), tokenizer, seq_len=99)
    corpus(asked(5), tokenizer, prefix=(7,))
    corpus(asked(5), small.byte_level(small.LLAMA3, "<|im_end|>"))
    corpus(asked(5), tokenizer, template="chatml")
    assert len(folders(tmp_path)) == 7


def test_the_cache_is_the_users_alone_and_no_pickle(corpus, tokenizer, tmp_path):
    corpus(asked(5), tokenizer)
    (folder,) = folders(tmp_path)
    for one in (folder, folder.parent):
        assert stat.S_IMODE(os.stat(one).st_mode) == 0o700
    assert sorted({p.suffix for p in folder.iterdir()}) == [".bin", ".json"]


@pytest.mark.parametrize("harm", ["cut", "flip", "json", "gone"])
def test_a_damaged_cache_is_made_anew(harm, corpus, tokenizer, tmp_path, said):
    before = corpus(asked(5), tokenizer)
    expected = [before.train.ids(i).tolist() for i in range(5)]
    (folder,) = folders(tmp_path)
    ids = folder / "ids.bin"
    content = ids.read_bytes()
    if harm == "cut":
        ids.write_bytes(content[:-4])
    elif harm == "flip":
        ids.write_bytes(content[:8] + bytes([content[8] ^ 1]) + content[9:])
    elif harm == "json":
        (folder / "rows.json").write_text("{")
    else:
        ids.unlink()
    after = corpus(asked(5), tokenizer)
    assert [after.train.ids(i).tolist() for i in range(5)] == expected
    assert "is damaged; it is made anew" in said[0]
    assert len(folders(tmp_path)) == 1


@pytest.mark.parametrize(
    ("rows", "options"),
    [("", {}), ([{"foo": 1}], {}), ([{"question": "Q", "answer": "A"}], {"columns": {"prompt": "q"}})],
)
def test_skipping_is_not_advised_where_it_cannot_help(rows, options, corpus, tokenizer):
    with pytest.raises(UserError, match=r"rows.jsonl:1: ") as raised:
        corpus(rows, tokenizer, **options)
    assert "bad_rows" not in str(raised.value)


@pytest.mark.parametrize("seed", range(5))
def test_many_copies_do_not_swell_what_is_held_out(seed, corpus, tokenizer):
    rows = [{"question": "Q", "answer": "same"}] * 40 + asked(17)
    made = corpus(rows, tokenizer, held_out=0.05, seed=seed)
    assert len(made.held_out) == 3
    made = corpus([rows[0]] * 20 + [rows[-1]] * 30, tokenizer, held_out=0.05, seed=seed)
    assert (len(made.held_out), len(made.train)) == (20, 30)  # the smallest there is


def test_a_template_that_is_no_text(corpus, tokenizer, tmp_path):
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe\x00")
    for template, said in ((str(tmp_path / "t.jinja"), "expected a chat template"), ("x" * 300, "is unknown")):
        with pytest.raises(UserError, match=rf"data.template.*{said}"):
            corpus(asked(2), tokenizer, template=template)


def test_a_cache_that_takes_nothing_costs_a_warning(corpus, tokenizer, tmp_path, said):
    expected = corpus(asked(5), tokenizer).train
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "data").write_text("a file")
    made = corpus(asked(5), tokenizer).train
    assert [made.ids(i).tolist() for i in range(5)] == [expected.ids(i).tolist() for i in range(5)]
    assert [line for line in said if "not kept" in line] == said


def test_a_failed_reading_leaves_nothing(corpus, tokenizer, tmp_path):
    with pytest.raises(UserError):
        corpus("".join(json.dumps(row) + "\n" for row in asked(2000)) + "broken\n", tokenizer)
    assert folders(tmp_path) == []


def test_two_processes_at_once(corpus, tokenizer, tmp_path, monkeypatch):
    real = store._stream

    def slow(folder, batches, first):
        monkeypatch.setattr(store, "_stream", real)
        corpus(asked(5), tokenizer)  # another is first
        return real(folder, batches, first)

    monkeypatch.setattr(store, "_stream", slow)
    assert len(corpus(asked(5), tokenizer).train) == 5
    assert len(folders(tmp_path)) == 1


def test_a_format_from_outside_needs_records_alone(tmp_path, tokenizer):
    module = ModuleType("squares")
    rows = asked(4)
    module.records = lambda options: ((f"squares:row {i}", row) for i, row in enumerate(rows, start=1))
    made = load(module, chatterbot.Options(held_out=0), tokenizer, 64, (), 0, tmp_path, print)
    assert [made.train.where(i) for i in range(4)] == [f"squares:row {i}" for i in range(1, 5)]
    rows[0]["answer"] = "changed"
    assert "changed" in tokenizer.decode(
        load(module, chatterbot.Options(), tokenizer, 64, (), 0, tmp_path, print).train.ids(0)
    )


@pytest.mark.slow
def test_ten_thousand_chats_take_seconds(tmp_path, smollm2):
    rng = np.random.default_rng(0)
    words = small.WORDS.split()
    path = tmp_path / "many.jsonl"
    with open(path, "w") as file:
        for _ in range(10_000):
            chat = [" ".join(rng.choice(words, rng.integers(5, 60))) for _ in range(4)]
            roles = ["user", "assistant"] * 2
            messages = [{"role": r, "content": c} for r, c in zip(roles, chat, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")
    start = time.process_time()
    made = load(jsonl, jsonl.Options(path=str(path)), smollm2, 512, (), 0, tmp_path / "cache", print)
    assert len(made.train) == 9_500
    # measured: 9 s of processor time
    assert time.process_time() - start < 60
    start = time.process_time()
    load(jsonl, jsonl.Options(path=str(path)), smollm2, 512, (), 0, tmp_path / "cache", print)
    assert time.process_time() - start < 3


@pytest.mark.slow
def test_a_large_file_streams(tmp_path):
    import resource

    tokenizer = small.words()
    path = tmp_path / "large.jsonl"
    line = json.dumps({"text": "the quick brown fox", "id": "x" * 60}) + "\n"
    path.write_text(line * 200_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = load(jsonl, jsonl.Options(path=str(path)), tokenizer, 64, (), 0, tmp_path / "cache", print)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert made.counts["read"] == 200_000
    # a batch takes a few MB and the rows' index 40 bytes a row; all rows as Python objects would take 400 MB
    assert grown < 120e6
