"""Each format reads its files, says file and line, and says what is wrong with them."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest

from ftrun import schema
from ftrun.data import lines
from ftrun.data.formats import chatterbot, csv, folder, hub, jsonl, mix, parquet, text
from ftrun.data.formats import json as json_format
from ftrun.data.record import CONTINUES, Bad
from ftrun.data.sources import check_sources, parts
from ftrun.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "data"
FORMATS = sorted(path.stem for path in CONF.glob("*.yaml"))
ROWS = [{"question": f"Q{i}", "answer": f"A{i}\nü"} for i in range(5)]


def read(module, path, **options):
    return list(module.records(module.Options(path=str(path), **options)))


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_every_yaml_is_its_options(name):
    import yaml

    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    kind = values.pop("kind")
    options = schema.read_options(Path(csv.__file__).with_name(f"{kind}.py"))
    assert set(values) == set(schema.field_types(options))
    needed = {"path": "x", "sources": [{"path": "x.jsonl"}]}
    given = {k: needed[k] for k in needed if k in values}
    assert schema.build(options, {**values, **given}, "data") == options(**given)
    module = importlib.import_module(f"ftrun.data.formats.{kind}")
    assert callable(module.records)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"chatterbot", "mix"}))
def test_a_path_is_needed(name):
    module = importlib.import_module(f"ftrun.data.formats.{name}")
    with pytest.raises(UserError, match=r"data.path: expected"):
        module.Options()


def test_jsonl(tmp_path):
    content = b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\n  \r\n{"text": "b\\n"}\n{"text": "\xc3\xbc"}'
    path = written(tmp_path / "a.jsonl", content)
    assert read(jsonl, path) == [
        (f"{path}:1", {"text": "a"}),
        (f"{path}:4", {"text": "b\n"}),
        (f"{path}:5", {"text": "ü"}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": ', 2, "broken JSON at column 7"),
        ("a.jsonl", '{"a": 1\n', 1, "broken JSON at column 8"),
        ("a.jsonl", '{"a": 1}\n[1]\n', 2, "found a list, expected one JSON object a line.*data=json"),
        ("a.jsonl", "3\n", 1, "found a number, expected"),
        ("a.jsonl", "", 1, "the file is empty, expected one JSON object a line"),
        ("a.jsonl", "\n\n", 1, "the file is empty"),
        ("a.jsonl", b'{"a": "\xff"}\n', 1, "the byte 0xff at position 8, expected text in UTF-8"),
        ("a.jsonl", b'{"a": "\0"}\n', 1, "a NUL byte at position 8"),
        ("a.jsonl", "[" * 100_000, 1, "nested too deeply"),
        ("a.csv", "a,b\n1,2\n", 1, "A .csv file is read by data=csv"),
    ],
)
def test_jsonl_says_what_is_wrong(name, content, line, message, tmp_path):
    path = written(tmp_path / name, content)
    bad = [(where, r) for where, r in read(jsonl, path) if isinstance(r, Bad)]
    where, record = bad[0]
    assert where == f"{path}:{line}"
    with pytest.raises(ValueError, match=message):
        raise ValueError(record.why)


@pytest.mark.parametrize("name", ["UTF-16", "UTF-32"])
def test_other_encodings_are_named(name, tmp_path):
    path = written(tmp_path / "a.jsonl", '{"text": "a"}\n'.encode(name))
    with pytest.raises(UserError, match=rf"a.jsonl:1: found {name} text, expected UTF-8.*iconv -f {name}"):
        read(jsonl, path)


def test_huge_lines_are_bad_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE", 1000)
    path = written(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "' + "b" * 5000 + '"}\n{"text": "c"}\n')
    first, second, third = read(jsonl, path)
    assert isinstance(second[1], Bad)
    assert "line of over" in second[1].why
    assert (first[1], third) == ({"text": "a"}, (f"{path}:3", {"text": "c"}))


def test_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert read(jsonl, path) == [(f"{path}:1", {"text": "a"})]
    written(path, gzip.compress(b'{"text": "a"}\n' * 100)[:20])
    with pytest.raises(UserError, match="cannot be read"):
        read(jsonl, path)


def test_paths(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    for name in ("b.jsonl", "a.jsonl", "inner/c.jsonl", "note.txt", ".hidden.jsonl"):
        written(tmp_path / name, '{"text": "x"}\n')
    assert [w.rpartition("/")[2] for w, _ in read(jsonl, tmp_path)] == ["a.jsonl:1", "b.jsonl:1", "c.jsonl:1"]
    assert [w.rpartition("/")[2] for w, _ in read(jsonl, tmp_path / "[ab].jsonl")] == ["a.jsonl:1", "b.jsonl:1"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read(jsonl, "~/a.jsonl")) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("trian.jsonl", r"data.path=.*trian.jsonl: there is no such file or folder. Did you mean '.*/train.jsonl'"),
        ("iner/x.jsonl", r"no such file or folder. Did you mean '.*/inner'"),
        ("*.nothing", "the pattern matches no file"),
        ("inner", r"expected .jsonl or .ndjson .* files in the folder, found files of the kinds .txt"),
    ],
)
def test_missing_paths(path, message, tmp_path):
    (tmp_path / "inner").mkdir()
    written(tmp_path / "inner" / "a.txt", "x")
    written(tmp_path / "train.jsonl", "{}\n")
    with pytest.raises(UserError, match=message):
        check_sources(jsonl, jsonl.Options(path=str(tmp_path / path)))


@pytest.mark.parametrize("form", ["list", "indented", "object", "lines", "bom"])
def test_json(form, tmp_path, monkeypatch):
    monkeypatch.setattr(json_format, "_BLOCK", 7)  # every value comes in several blocks
    content = {
        "list": json.dumps(ROWS),
        "indented": "\r\n" + json.dumps(ROWS, indent=2, ensure_ascii=False),
        "object": json.dumps({"version": 1.0, "data": ROWS}),
        "lines": "\n".join(map(json.dumps, ROWS)),
        "bom": "\ufeff" + json.dumps(ROWS),
    }[form]
    path = written(tmp_path / "a.json", content)
    assert read(json_format, path) == [(f"{path}:row {i}", row) for i, row in enumerate(ROWS, start=1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n {"a": }]', r"a.json:2: broken JSON at column 8"),
        ('[{"a": 1},\n {"a": 2}', r"a.json:2: broken JSON at column 10 \(the list is not closed\)"),
        ("hello", r"a.json:1: broken JSON at column 1"),
        (b'[{"a": "\xff"}]', r"a.json:1: found the byte 0xff, expected text in UTF-8"),
        ("[1]".encode("utf-16"), r"a.json:1: found UTF-16 text"),
    ],
)
def test_json_that_is_broken(content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(json_format, written(tmp_path / "a.json", content))


def test_json_rows_that_are_none(tmp_path):
    assert "the file holds no rows" in read(json_format, written(tmp_path / "a.json", "[]"))[0][1].why
    assert "the file holds no rows" in read(json_format, written(tmp_path / "a.json", "  "))[0][1].why
    assert "found a number" in read(json_format, written(tmp_path / "a.json", '[{"a": 1}, 3]'))[1][1].why


def test_csv(tmp_path):
    content = '\ufeffquestion,answer\r\nQ0,"A0\r\nmore"\r\n\r\nQ1,"say ""hi"""\r\n'
    path = written(tmp_path / "a.csv", content)
    assert read(csv, path) == [
        (f"{path}:2", {"question": "Q0", "answer": "A0\r\nmore"}),
        (f"{path}:5", {"question": "Q1", "answer": 'say "hi"'}),
    ]
    tabs = written(tmp_path / "a.tsv", "question\tanswer\nQ\tA,B\n")
    assert read(csv, tabs) == [(f"{tabs}:2", {"question": "Q", "answer": "A,B"})]
    long = written(tmp_path / "b.csv", "text\n" + "x" * 300_000 + "\n")
    assert len(read(csv, long)[0][1]["text"]) == 300_000


def test_csv_rows_that_are_wrong(tmp_path):
    path = written(tmp_path / "a.csv", b'a,b\n1,2,3\n4,5\n\xff,6\n7,8\n9,"open\n')
    rows = read(csv, path)
    assert [(w.rpartition(":")[2], isinstance(r, Bad)) for w, r in rows] == [
        ("2", True),
        ("3", False),
        ("4", True),
        ("5", False),
        ("6", True),
    ]
    assert "found 3 fields, expected 2 (a, b)" in rows[0][1].why
    assert "0xff" in rows[2][1].why


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,a\n1,2\n", "the column 'a' appears twice"),
        ("a;b\n1;2\n", "found one column 'a;b', expected several.*data.delimiter=';'"),
        (b"\xff,a\n", "0xff"),
    ],
)
def test_csv_headers_that_are_wrong(content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(csv, written(tmp_path / "a.csv", content))


def test_csv_delimiters_and_empty_files(tmp_path):
    path = written(tmp_path / "a.csv", "a;b\n1;2\n")
    assert read(csv, path, delimiter=";")[0][1] == {"a": "1", "b": "2"}
    assert "empty" in read(csv, written(tmp_path / "b.csv", ""))[0][1].why


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    chat = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": r["answer"]}] for r in ROWS]
    pq.write_table(pa.table({"messages": chat}), path, row_group_size=2)
    rows = read(parquet, path)
    assert [w for w, _ in rows] == [f"{path}:row {i}" for i in range(1, 6)]
    assert rows[4][1]["messages"] == chat[4]
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "empty" in read(parquet, path)[0][1].why
    with pytest.raises(UserError, match=r"b.parquet: found no readable Parquet file"):
        read(parquet, written(tmp_path / "b.parquet", "nothing of the kind"))
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xe3\x28"))
    pq.write_table(pa.table({"text": broken}), path)
    with pytest.raises(UserError, match=r"a.parquet: found no readable Parquet file \('utf-8' codec"):
        read(parquet, path)


def test_text_comes_in_blocks_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 10)
    content = "".join(f"line {i}\n" for i in range(9))
    path = written(tmp_path / "a.txt", content)
    rows = read(text, path)
    assert "".join(r["text"] for _, r in rows) == content
    assert [r[CONTINUES] for _, r in rows] == [True] * (len(rows) - 1) + [False]
    assert [w.rpartition(":")[2] for w, _ in rows] == ["1", "3", "5", "7", "9"]
    assert "empty" in read(text, written(tmp_path / "b.txt", " \n"))[0][1].why
    with pytest.raises(UserError, match=r"data.loss_on has no effect here: Plain text"):
        text.Options(path="x", loss_on="all")


def test_folder(tmp_path):
    import datasets

    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(tmp_path / "one", num_shards=2)
    rows = read(folder, tmp_path / "one")
    assert [r for _, r in rows] == ROWS
    assert rows[-1][0] == f"{tmp_path}/one:row 5"
    datasets.DatasetDict({"train": made.select([3, 1]), "test": made.select([0])}).save_to_disk(tmp_path / "two")
    assert [r for _, r in read(folder, tmp_path / "two")] == [ROWS[3], ROWS[1]]
    options = folder.Options(path=str(tmp_path / "two"), held_out_split="test")
    assert [r for _, r in folder.records(options.apart())] == [ROWS[0]]
    with pytest.raises(UserError, match=r"the split 'tets' is unknown. Did you mean 'test'"):
        read(folder, tmp_path / "two", split="tets")
    with pytest.raises(UserError, match=r"no such file or folder. Did you mean '.*/one'"):
        read(folder, tmp_path / "on")
    with pytest.raises(UserError, match=r"found no state.json or dataset_dict.json"):
        read(folder, tmp_path)
    arrow = next((tmp_path / "one").glob("*.arrow"))
    arrow.write_bytes(b"no arrow")
    with pytest.raises(UserError, match="found no readable Arrow file"):
        read(folder, tmp_path / "one")


def test_hub_offline():
    with pytest.raises(UserError, match=r"data.path=owner/name: the hub cannot be reached.*data=folder"):
        hub.fingerprint(hub.Options(path="owner/name"))


@pytest.mark.parametrize("client", ["httpx", "httpx2"])
def test_hub_without_a_network(client, monkeypatch):
    """Whatever the hub's client stands on in this version: its errors are no OSError."""
    import huggingface_hub

    raised = type("ConnectError", (Exception,), {"__module__": f"{client}._exceptions"})("no route to the host")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: (_ for _ in ()).throw(raised))
    with pytest.raises(UserError, match=r"the hub cannot be reached \(no route to the host\)"):
        hub.fingerprint(hub.Options(path=f"owner/{client}"))


def test_hub_streams_plain_data_alone(tmp_path, monkeypatch):
    import datasets

    with open(tmp_path / "train.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    monkeypatch.setattr(hub, "_commit", lambda path, revision: "abc")
    real = datasets.load_dataset_builder
    monkeypatch.setattr(
        datasets,
        "load_dataset_builder",
        lambda path, name, revision: real("json", data_files=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path)),
    )
    rows = read(hub, "owner/name")
    assert rows[0] == ("owner/name:row 1", ROWS[0])
    assert hub.fingerprint(hub.Options(path="owner/name", split="x")) == "owner/name@abc:None:x"
    with pytest.raises(UserError, match=r"the split 'trian' is unknown. Did you mean 'train'"):
        read(hub, "owner/name", split="trian")
    monkeypatch.setattr(hub, "_READERS", ("parquet",))
    with pytest.raises(UserError, match="found a data set of the kind 'json', expected plain data"):
        read(hub, "owner/name")


def test_chatterbot(monkeypatch):
    rows = list(chatterbot.records(chatterbot.Options()))
    assert len(rows) == 2026
    assert not any(isinstance(r, Bad) for _, r in rows)
    where, record = rows[0]
    assert where == "ai.yml:5"
    assert record["messages"][0] == {"role": "user", "content": "What is AI?"}
    assert all([m["role"] for m in r["messages"]][:2] == ["user", "assistant"] for _, r in rows)
    few = list(chatterbot.records(chatterbot.Options(topics=["history"])))
    assert {w.partition(":")[0] for w, _ in few} == {"history.yml"}
    with pytest.raises(UserError, match=r"the topic 'histroy' is unknown. Did you mean 'history'"):
        chatterbot.check(chatterbot.Options(topics=["histroy"]))
    monkeypatch.setattr(chatterbot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps chatterbot-corpus==1.3.3"):
        chatterbot.check(chatterbot.Options())


def test_mix_recognises_formats(tmp_path):
    written(tmp_path / "a.jsonl", '{"text": "a"}\n')
    written(tmp_path / "b.csv", "q,a\nQ,A\n")
    (tmp_path / "c").mkdir()
    written(tmp_path / "c" / "d.txt", "words\n")
    entries = [
        {"path": str(tmp_path / "a.jsonl"), "weight": 2},
        {"path": str(tmp_path / "b.csv"), "columns": {"prompt": "q", "completion": "a"}},
        {"path": str(tmp_path / "c")},
        {"kind": "chatterbot", "topics": ["ai"], "limit": 3},
    ]
    made = parts(mix, mix.Options(sources=entries, system="S", limit=7))
    assert [type(p.options).__module__.rpartition(".")[2] for p in made] == ["jsonl", "csv", "text", "chatterbot"]
    assert [p.weight for p in made] == [2, 1, 1, 1]
    assert [p.options.limit for p in made] == [7, 7, None, 3]
    assert made[1].options.columns == {"prompt": "q", "completion": "a"}
    check_sources(mix, mix.Options(sources=entries))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a.bin"}, r"data.sources\[0\].path=a.bin: expected a .jsonl, .json, .csv"),
        ({"path": "a.jsonl", "weigth": 2}, r"data.sources\[0\]: the key 'weigth' is unknown"),
        ({"path": "a.jsonl", "weight": 0}, r"data.sources\[0\].weight=0: expected a number, more than 0"),
        (
            {"path": "a.jsonl", "kind": "jsnl"},
            r"data.sources\[0\].kind: the format 'jsnl' is unknown. Did you mean 'jsonl'",
        ),
        ({"path": "a.jsonl", "loss_on": "x"}, r"data.sources\[0\].loss_on=x: expected one of"),
        ({"path": "a.jsonl"}, r"data.path=a.jsonl: there is no such file"),
    ],
)
def test_mix_says_what_is_wrong(entry, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        check_sources(mix, mix.Options(sources=[entry]))


def test_mistakes_are_answered_without_heavy_imports(tmp_path):
    import subprocess

    code = (
        "import sys, importlib\n"
        "from ftrun.data.sources import check_sources\n"
        "for name in 'chatterbot jsonl json csv parquet text folder hub mix'.split():\n"
        "    m = importlib.import_module(f'ftrun.data.formats.{name}')\n"
        "m = importlib.import_module('ftrun.data.formats.jsonl')\n"
        "try: check_sources(m, m.Options(path='nowhere.jsonl'))\n"
        "except ValueError as e: print(e)\n"
        "print({'torch', 'numpy', 'pyarrow', 'transformers', 'datasets', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.endswith("set()\n")
    assert "nowhere.jsonl" in done.stdout
