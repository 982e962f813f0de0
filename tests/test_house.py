"""The house holds: imports point downward, one variant is one file and one YAML, nothing grows too large."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ftrun import schema
from ftrun.groups import choices_of, conf_dir, find_choice, read_choice, study_of
from ftrun.job import ROOMS, STUDY_ROOMS, find_variant

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ftrun"
FILES = sorted(PACKAGE.rglob("*.py"))
# the first entry that a module's name starts with is its room; floor 1's rooms do not know one another
FLOORS = {
    **dict.fromkeys(("cli", "help", "completion", "hydra_flags", "__main__"), 4),
    **dict.fromkeys(("tasks", "studies"), 3),
    **dict.fromkeys(("assemble", "stepping", "planning", "train"), 2),
    **dict.fromkeys(("models", "methods", "memory", "data", "optim", "metrics", "evals", "report"), 1),
    **dict.fromkeys(("errors", "schema", "values", "selection", "job", "shell", "groups", "replay", "compose"), 0),
    **dict.fromkeys(("runs", "lock", "secrets", "early", "beside", "dialogue", "kernels", "__init__"), 0),
}
LINES, BODY = 400, 60


def room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of ftrun in a file, those inside functions too."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "ftrun")
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            if module.split(".")[0] == "ftrun":
                # `from ftrun import assemble` imports a module, `from ftrun.job import Job` a name
                names = [f"{module}.{a.name}" for a in node.names] if module == "ftrun" else [module]
                yield from ((node.lineno, name) for name in names)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_downward(path: Path) -> None:
    own = room(module_of(path))
    assert own in FLOORS, f"{own}: on which floor?"
    for line, module in imported(path):
        other = room(module)
        # a study starts worker processes; what a job is made of it never imports
        assert own != "studies" or other != "tasks", f"{path}:{line} imports {module}"
        place = f"{path.relative_to(ROOT)}:{line} imports {module}"
        assert other in FLOORS, place
        assert FLOORS[other] <= FLOORS[own], f"{place}: upward"
        if FLOORS[own] == 1 and FLOORS[other] == 1:
            assert other == own, f"{place}: rooms of floor 1 do not know one another"


def test_the_guard_sees_every_form_of_import(tmp_path: Path) -> None:
    path = PACKAGE / "optim" / "adamw.py"
    assert "ftrun.schema" in {m for _, m in imported(path)}
    assert {"ftrun.assemble", "ftrun.data.show"} <= {m for _, m in imported(PACKAGE / "tasks" / "data.py")}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            assert size <= BODY, f"{node.name}: {size} lines"


def test_no_room_for_what_belongs_nowhere() -> None:
    names = {part.removesuffix(".py") for path in FILES for part in path.relative_to(ROOT).parts}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc"}
    top = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and (p / "__init__.py").is_file()}
    assert top == {"ftrun", "tests"}


CHOICES = [(group, name) for group in ROOMS for name in choices_of(group)]
STUDY_CHOICES = [(group, name) for group in STUDY_ROOMS for name in choices_of(group)]


@pytest.mark.parametrize(("group", "name"), STUDY_CHOICES, ids=[f"{g}={n}" for g, n in STUDY_CHOICES])
def test_a_choice_of_a_study_lists_its_options_and_says_its_command(group: str, name: str) -> None:
    path = find_choice(group, name)
    tree, _ = read_choice(path)
    assert set(tree) - {"kind"} == set(schema.fields_by_key(schema.read_options(find_variant(group, tree["kind"])[1])))
    head = path.read_text(encoding="utf-8").splitlines()[:3]
    assert any(line.startswith("# ftrun -m ") and f"{group}={name}" in line for line in head), head


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=[f"{g}={n}" for g, n in CHOICES])
def test_a_choice_lists_every_option_of_its_kind_and_no_other(group: str, name: str) -> None:
    from ftrun.groups import compose_groups

    tree, _ = compose_groups({group: name})
    listed = set(tree[group]) - {"kind"}
    _, path = find_variant(group, str(tree[group].get("kind", "")))
    assert listed == set(schema.fields_by_key(schema.read_options(path)))


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=[f"{g}={n}" for g, n in CHOICES])
def test_a_choice_says_the_command_that_takes_it(group: str, name: str) -> None:
    head = find_choice(group, name).read_text(encoding="utf-8").splitlines()[:3]
    assert any(line.startswith("# ftrun ") and f"{group}={name}" in line for line in head), head


@pytest.mark.parametrize("name", choices_of("recipe"))
def test_a_recipe_says_its_command_and_holds_overrides_only(name: str) -> None:
    path = find_choice("recipe", name)
    head = path.read_text(encoding="utf-8").splitlines()[:3]
    assert head[0] == "# @package _global_"
    flag = "-m " if study_of(name) else ""
    assert head[1].startswith(f"# ftrun {flag}recipe={name}")
    assert head[2].startswith("# Shows ")
    tree, _ = read_choice(path)
    assert all(str(k).startswith("override /") for entry in tree.get("defaults", []) for k in entry)


@pytest.mark.parametrize(
    "group", [g for g, room in {**ROOMS, **STUDY_ROOMS}.items() if (ROOT / room.replace(".", "/")).is_dir()]
)
def test_a_variant_is_one_file_with_a_yaml(group: str) -> None:
    folder = ROOT / {**ROOMS, **STUDY_ROOMS}[group].replace(".", "/")
    variants = {p.stem for p in folder.glob("*.py") if "\nclass Options" in p.read_text(encoding="utf-8")}
    kinds = set()
    for name in choices_of(group):
        tree, at_root = read_choice(find_choice(group, name))
        part = tree.get(group, {}) if at_root else tree
        kinds |= {part["kind"]} if "kind" in part else set()
    assert kinds == variants


def test_conf_holds_groups_and_nothing_else() -> None:
    assert {p.name for p in conf_dir().iterdir()} == {"config.yaml", *ROOMS, *STUDY_ROOMS}
    tree = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))
    assert {next(iter(entry)) for entry in tree["defaults"] if isinstance(entry, dict)} == {*ROOMS, "recipe"}
