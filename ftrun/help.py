"""`ftrun --help` and `ftrun VERB --help`: drawn from the dataclasses' own lines and from what lies in conf/."""

from __future__ import annotations

import ast
import dataclasses
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ftrun import schema
from ftrun.groups import choices_of
from ftrun.job import GROUPS, ROOMS, STUDY_ROOMS, Job, find_variant

_WIDTH = 80
_KEY = 26
_FLAGS = (
    ("--help, --version", "this text, or a verb's own; the version"),
    ("-m, --multirun", "a study: every combination of the values a,b,c, or what search= asks for; ftrun plan -m tells"),
    ("--cfg job", "the composed job as YAML; --resolve fills references in, --package method shows one part"),
    ("--info [WHAT]", "Hydra's view of the composition: defaults, defaults-tree, searchpath, …"),
    ("--config-dir DIR", "more choices of groups, from a folder of your own"),
    ("-sc install=bash", 'the script for completion: eval "$(ftrun -sc install=bash)"; zsh and fish alike'),
)
_EXAMPLES = (
    ("ftrun method=qlora rank=16", "the main job: SmolLM2-135M, 4-bit, on conversations"),
    ("ftrun data=jsonl data.path=my.jsonl model.path=DIR", "your data, your model"),
    ("ftrun method=dora rank=8 layers=last:8 targets=attention", "a part of the model"),
    ("ftrun -m method=lora,dora rank=4,8,16", "a study of six jobs, with a table and a page"),
    ("ftrun job=runs/NAME/job.yaml lr=1e-4", "a job again, with another rate"),
)
_MEANT = {
    "model": "the base model",
    "method": "how it is tuned; sets its own rank, targets and rate",
    "quant": "how the frozen weights are stored",
    "data": "what it learns from",
    "optim": "the optimiser and its schedule",
    "eval": "what is measured before, during and after",
    "log": "where the records go, beside the run's folder",
    "device": "what it runs on, or is planned for",
    "recipe": "a named job or study of recipes/, on top of the defaults",
    "search": "which points are tried",
    "launcher": "where the jobs run",
}


@dataclass(frozen=True)
class Described:
    """One key: what the user types, its path in the tree, its default as typed, its line, the values it takes."""

    key: str
    path: str
    default: str
    doc: str
    choices: tuple[str, ...]


def show(
    verb: str | None,
    verbs: Mapping[str, Path],
    arguments: Sequence[str],
    config_dirs: Sequence[Path],
    instead: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Print the help of a verb on the job of `arguments`, or of the command. instead: what a verb without one takes."""
    if verb is None:
        lines = _command(verbs, config_dirs)
    elif verb in instead:
        lines = _head(verb, verbs[verb], f"{instead[verb]} [KEY=VALUE ...]".strip())
    else:
        lines = _verb(verb, verbs[verb], arguments, config_dirs)
    print("\n".join(lines))
    return 0


def _command(verbs: Mapping[str, Path], config_dirs: Sequence[Path]) -> list[str]:
    keys = [one for one in described((), config_dirs) if "." not in one.path]
    return [
        "ftrun: fine-tune a language model, and know beforehand what it takes",
        "",
        "  ftrun [VERB] [GROUP=NAME ...] [KEY=VALUE ...] [FLAGS]",
        *_section("Verbs", [(name, _summary(path)) for name, path in verbs.items()]),
        "  Each has a help of its own, with every option: ftrun VERB --help",
        *_section("Groups", [(f"{g}=", _group(g, config_dirs)) for g in GROUPS]),
        *_section("Groups of a study (ftrun -m)", [(f"{g}=", _group(g, config_dirs)) for g in STUDY_ROOMS]),
        *_section("Keys", [(f"{one.key}={one.default}", one.doc) for one in keys]),
        *_section("", [("job=FILE", "start from a job.yaml: its choices, its values, then this line's")]),
        *_section("Flags", _FLAGS),
        *_section("Examples", [(text, "") for text, _ in _EXAMPLES], [doc for _, doc in _EXAMPLES]),
    ]


def _verb(verb: str, path: Path, arguments: Sequence[str], config_dirs: Sequence[Path]) -> list[str]:
    lines = _head(verb, path, "[GROUP=NAME ...] [KEY=VALUE ...] [FLAGS]")
    found = described(arguments, config_dirs)
    choices = _chosen(arguments, config_dirs)
    own = verb_options(path)
    of_run = own is not None and "run" in schema.fields_by_key(own)
    title = "The job: as the run's folder has it, but for what is given here" if of_run else "The job"
    lines += _section(title, [(f"{o.key}={o.default}", o.doc) for o in found if "." not in o.path])
    for group in ROOMS:
        others = [n for n in choices_of(group, config_dirs) if n != choices[group]]
        title = f"{group}={choices[group]}: {_MEANT[group]}"
        rows = [(f"{o.key}={o.default}", o.doc) for o in found if o.path.startswith(f"{group}.")]
        lines += _section(title, rows or [("", "no options")])
        lines += _wrapped(f"also {group}=" + ", ".join(others), "  ", "    ") if others else []
    return [*lines, "", *_wrapped(f"Another choice's options: ftrun {verb} GROUP=NAME --help", "", "")]


def _head(verb: str, path: Path, takes: str) -> list[str]:
    """How the verb is typed, what it does, and its own options."""
    text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").strip()
    own = verb_options(path)
    lines = [f"ftrun {verb} {takes}", "", *_paragraphs(text)]
    if own:
        rows = [(f"{k}={_typed(_default(f))}", f.metadata["doc"]) for k, f in schema.fields_by_key(own).items()]
        lines += _section("Options of this verb", rows)
    return lines


def described(arguments: Sequence[str], config_dirs: Sequence[Path] = ()) -> list[Described]:
    """Every key of the job of `arguments`, the root's first, as the user types it."""
    from omegaconf import OmegaConf

    from ftrun.compose import composed

    made = composed(arguments, config_dirs)
    tree: Any = OmegaConf.to_container(made.tree, resolve=False)
    found = []
    for group in ROOMS:
        _, path = find_variant(group, str(tree[group].get("kind", "")))
        for key, field in schema.fields_by_key(schema.read_options(path)).items():
            full = f"{group}.{key}"
            shown = made.references.get(full, full)
            value = tree.get(shown) if shown in tree else tree[group].get(key)
            found.append(_describe(shown, full, value, field))
    root = [
        _describe(key, key, tree.get(key), field)
        for key, field in schema.fields_by_key(Job).items()
        if key not in ROOMS and key != "tree"
    ]
    first = [one for one in found if "." not in one.key]
    return [*[Described(o.key, o.key, o.default, o.doc, o.choices) for o in first], *root, *found]


def _describe(key: str, path: str, value: Any, field: Any) -> Described:
    kinds = ("true", "false") if field.type in ("bool", bool) else ()
    choices = tuple(_typed(c) for c in field.metadata.get("choices") or ()) or kinds
    doc = field.metadata["doc"]
    if field.metadata.get("choices") and not all(c in doc for c in choices):
        doc = f"{doc}: {', '.join(choices)}"
    return Described(key, path, _typed(value), doc, choices)


def _chosen(arguments: Sequence[str], config_dirs: Sequence[Path]) -> dict[str, str]:
    from ftrun.compose import composed

    return composed(arguments, config_dirs).choices


def verb_options(path: Path) -> type | None:
    """The class `Options` of a verb's file, read without importing it; None where the verb takes none of its own."""
    try:
        return schema.read_options(path)
    except KeyError:
        return None


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def _summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def _group(group: str, config_dirs: Sequence[Path]) -> str:
    return f"{_MEANT[group]}: {', '.join(choices_of(group, config_dirs))}"


def _typed(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_typed, value)) + "]"
    if isinstance(value, Mapping):
        return "{}" if not value else "{…}"
    return str(value)


def _section(title: str, rows: Iterable[tuple[str, str]], below: Sequence[str] = ()) -> list[str]:
    lines = ["", title] if title else []
    for number, (key, doc) in enumerate(rows):
        if len(key) >= _KEY:
            lines.append(f"  {key}")
            key = ""
        if doc:
            lines += _wrapped(doc, f"  {key:<{_KEY}}" if key or lines else "  ", " " * (_KEY + 2))
        elif key:
            lines.append(f"  {key}")
        lines += [f"      {below[number]}"] if below else []
    return lines


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _paragraphs(text: str) -> list[str]:
    """A docstring's, each wrapped; indented lines, commands and what they do, stand as they are."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        commands = all(line.startswith("  ") for line in paragraph.splitlines())
        lines += [*(paragraph.splitlines() if commands else _wrapped(" ".join(paragraph.split()), "", "")), ""]
    return lines[:-1]
