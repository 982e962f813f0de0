"""What the user typed is what reaches the job: quoting, paths, patterns, awkward characters."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from ftrun.compose import sweep
from ftrun.errors import UserError
from ftrun.shell import as_override, escape, parse, plain, quote, unquote

AWKWARD = [
    "Tom's 3 apples, he said: how many?",
    "a,b",
    "(x",
    "[INST] hi",
    "~tilde in the middle ~/x",
    "\"double\" and 'single'",
    "{a: b}",
    "a=b=c",
    "$HOME ${rank} ${oc.env:HOME} $",
    "# not a comment",
    "tail\\",
    "tail\\\\",
    "\\${x} \\\\${y}",
    "'",
    '"',
    "\\'",
    "two\nlines\ttab",
    "naïve – 日本語 🙂",
    " leading and trailing ",
    "*?|<>&;!",
    "007",
    "1e-3",
    "true",
]


def held(value: object) -> object:
    """What a resolved configuration holds where `value` was set."""
    return OmegaConf.to_container(OmegaConf.create({"x": value}), resolve=True)["x"]  # type: ignore[index, call-overload]


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    letters = "ab 0'\"\\${}[]()~,:=#@!?%&*|<>;\n\té日.-_+/"
    return ["".join(draw.choices(letters, k=draw.randint(1, 24))) for _ in range(count)]


@pytest.mark.parametrize("text", AWKWARD)
def test_text_reaches_the_job_as_typed(text: str) -> None:
    (one,) = parse([f"eval.prompt={text}"], multirun=False)
    assert held(one.value) == text


def test_any_text_reaches_the_job_as_typed() -> None:
    for text in random_texts(2000):
        if unquote(text) is None and text != "???":
            (one,) = parse([f"eval.prompt={text}"], multirun=False)
            assert held(one.value) == text


def test_a_text_in_quotes_loses_them_as_hydra_users_write() -> None:
    for text in [*AWKWARD, *random_texts(2000)]:
        assert unquote(quote(text)) == text
        assert held(escape(plain("eval.prompt", quote(text)))) == text
    assert plain("eval.prompt", '"a, b"') == "a, b"
    assert plain("eval.prompt", "'it\\'s'") == "it's"
    assert plain("eval.prompt", "'a' and 'b'") == "'a' and 'b'"


def test_quoting_is_hydras() -> None:
    parser = OverridesParser.create()
    for text in [*AWKWARD, *random_texts(300)]:
        assert parser.parse_override(f"x={quote(text)}").value() == text


def test_paths_expand_home_and_may_be_lists(tmp_path: Path) -> None:
    home = str(Path.home())
    assert plain("data.path", "~/my data, (v2) [x].jsonl") == f"{home}/my data, (v2) [x].jsonl"
    assert plain("out", "~") == home
    assert plain("eval.prompt", "~/x") == "~/x"
    assert plain("data.path", "[~/a b.jsonl,'c, d.jsonl']") == [f"{home}/a b.jsonl", "c, d.jsonl"]
    assert plain("out", "[a,b]") == "[a,b]"
    bracketed = tmp_path / "[a,b]"
    bracketed.mkdir()
    assert plain("data.path", str(bracketed)) == str(bracketed)
    assert plain("out", "null") is None


def test_patterns_keep_their_characters() -> None:
    pattern = r"re:model\.layers\.(0|1)\..*proj"
    for key in ("targets", "method.targets"):
        (one,) = parse([f"{key}={pattern}"], multirun=True)
        assert held(one.value) == pattern
        assert not one.points


def test_long_text_is_taken_whole() -> None:
    text = "word, " * 100_000
    (one,) = parse([f"eval.prompt={text}"], multirun=False)
    assert one.value == text


def test_long_lists_are_read_quickly() -> None:
    (one,) = parse([f"layers=[{','.join(map(str, range(20_000)))}]"], multirun=False)
    assert one.value == list(range(20_000))
    for text in ("1" * 100_000, "x-" * 100_000):
        (one,) = parse([f"rank={text}"], multirun=False)
        assert one.value == text


def test_other_values_are_hydras() -> None:
    typed = [
        "rank=8",
        "lr=1e-3",
        "layers=[0,3]",
        "debug=true",
        "steps=null",
        "method.rank_pattern={'last:4': 32, b: 1}",
    ]
    values = [o.value for o in parse(typed, multirun=False)]
    assert values == [8, 1e-3, [0, 3], True, None, {"last:4": 32, "b": 1}]


def test_sweeps() -> None:
    one, two, three = parse(["method=lora,dora", "rank=choice(4,8)", "data.path=a b.jsonl,~/c.jsonl"], multirun=True)
    assert one.points == ("lora", "dora")
    assert two.points == ("4", "8")
    assert three.points == (as_override("a b.jsonl"), as_override(str(Path.home() / "c.jsonl")))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("layers=0,3", "layers=[0,3]"),
        ("method=lora,dora", "-m"),
        ("rank=choice(4,8)", "-m"),
        ("rank", "KEY=VALUE"),
        ("", "KEY=VALUE"),
        ("=3", "is no key"),
        ("~method", "choose another value"),
        ("~rank=8", "choose another value"),
        ("hydra.run.dir=/tmp", "out=DIR"),
        ("hydra/launcher=joblib", "-m"),
        ("method@x=lora", "is no key"),
        ("rank=[[[", "not understood"),
        ("rank=a b(", "not understood"),
        ("rank=" + "1" * 490 + "(", "not understood"),
        ("rank=" + "[" * 100_000, "deep"),
        ("rank=\udcff", "UTF-8"),
    ],
)
def test_what_is_no_override(argument: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse([argument], multirun=False)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_interval_has_no_points_of_its_own() -> None:
    (one,) = parse(["lr=tag(log,interval(1e-5,1))"], multirun=True)
    assert (one.points, one.interval.start, one.interval.end, one.interval.tags) == ((), 1e-5, 1, {"log"})
    with pytest.raises(UserError, match="interval"):
        sweep(["lr=interval(0,1)"])
    with pytest.raises(UserError, match="-m"):
        parse(["lr=interval(0,1)"], multirun=False)


def test_of_a_key_given_twice_the_last_rules() -> None:
    assert [o.text for o in parse(["rank=8", "lr=1", "rank=9"], multirun=False)] == ["lr=1", "rank=9"]
    assert len(parse(["rank=8", "rank=8"], multirun=False)) == 1
