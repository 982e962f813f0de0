"""The embedded default: the English conversations of the package chatterbot-corpus (BSD)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftrun.data.files import digest
from ftrun.data.options import DataOptions
from ftrun.data.record import Bad, Records
from ftrun.errors import UserError, unknown
from ftrun.schema import option

PACKAGE = "chatterbot-corpus==1.3.3"


@dataclass(frozen=True)
class Options(DataOptions):
    """A question and its answers, in turns: user, assistant, user, …"""

    distinct: bool = option(True, "take each row once: 1,127 of the corpus's 2,026 repeat another word for word")
    topics: list[str] = option([], "files to take, [ai,history]; [] = all")


def check(options: Options) -> None:
    """UserError where the package or a topic is missing."""
    _files(options)


def fingerprint(options: Options) -> str:
    """Changes with the files' content."""
    return digest(_files(options))


def records(options: Options) -> Records:
    """Each conversation as messages, with its "file:line"."""
    for path in _files(options):
        for line, turns in _conversations(path):
            if isinstance(turns, Bad):
                yield f"{path.name}:{line}", turns
                continue
            roles = ("user", "assistant")
            messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
            yield f"{path.name}:{line}", {"messages": messages}


def _files(options: Options) -> list[Path]:
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"data=chatterbot: the package {PACKAGE} is not installed. Get it: pip install --no-deps {PACKAGE}"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data" / "english"
    files = {path.stem: path for path in sorted(folder.glob("*.yml"))}
    if not files:
        raise UserError(f"{folder}: found no .yml files, expected those of {PACKAGE}: pip install --no-deps {PACKAGE}")
    for topic in options.topics:
        if topic not in files:
            raise UserError(unknown("data.topics: the topic", topic, files))
    return [path for topic, path in files.items() if not options.topics or topic in options.topics]


def _conversations(path: Path) -> Iterator[tuple[int, list[str] | Bad]]:
    """(line, turns) of each conversation; nodes rather than values, for the line and the text as written."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with open(path, encoding="utf-8") as stream:
        root: Any = yaml.compose(stream, Loader=loader)
    listed = next((value for key, value in root.value if key.value == "conversations"), None)
    for node in listed.value if listed is not None else ():
        yield node.start_mark.line + 1, _turns(node)


def _turns(node: Any) -> list[str] | Bad:
    if isinstance(node.value, str):
        # one entry of the corpus is written on one line: question - 'answer'
        question, dash, answer = node.value.rpartition(" - ")
        return [question, answer.strip("'\"")] if dash else Bad("found one text, expected a list of turns")
    turns = [item.value for item in node.value]
    if not all(isinstance(turn, str) for turn in turns):
        return Bad("found a turn that is not text, expected a list of texts")
    return turns
