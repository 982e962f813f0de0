"""job=FILE: a job.yaml as the start of a job. Its choices, then its values; the command line comes on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftrun.errors import UserError, nearest, unknown
from ftrun.groups import defaults, find_choice, keys_of, leaves, one_line, overrides_of
from ftrun.job import ROOMS

# where a run writes is not what it is: the job runs again in a folder of its own
_PLACES = ("name", "out")


@dataclass(frozen=True)
class JobFile:
    """A job.yaml, read."""

    path: Path
    choices: Mapping[str, str]
    tree: Mapping[str, Any]

    @property
    def shown(self) -> str:
        """How messages call it."""
        return f"job={self.path}"

    def kept(self, chosen: Mapping[str, str], config_dirs: Sequence[Path] = ()) -> dict[str, str]:
        """The file's choices, less those of the groups that the command line chooses.

        A choice of the command line may bring others with it (method=qlora: quant=nf4): they take the place of what
        the file has at its default, not of what somebody chose.
        """
        taken, usual = set(chosen), defaults()
        for group, name in chosen.items():
            brought = overrides_of(group, name, config_dirs)
            taken |= {g for g in brought if self.choices.get(g) == usual.get(g)}
        kept = {g: c for g, c in self.choices.items() if g not in taken}
        for group, name in kept.items():
            try:
                find_choice(group, name, config_dirs)
            except UserError as error:
                raise UserError(f"{self.shown}: {error}") from None
        return kept

    def values(self, choices: Mapping[str, str], config_dirs: Sequence[Path] = ()) -> dict[str, Any]:
        """The file's values by dotted path, an option of a group or a key at the root each.

        choices: of the job that starts from this file. Where one differs from the file's, the file's values of that
        group stay behind, and so do the keys at the root that either choice sets (rank, targets, lr).
        """
        changed = {g for g, c in self.choices.items() if choices[g] != c}
        behind = set(_PLACES)
        for group in changed:
            behind |= self._keys(group, self.choices[group], config_dirs) | self._keys(
                group, choices[group], config_dirs
            )
        return {
            path: value
            for path, value in leaves(self.tree, depth=2)
            if path not in behind and path.partition(".")[0] not in changed
        }

    def _keys(self, group: str, name: str, config_dirs: Sequence[Path]) -> set[str]:
        try:
            return keys_of(group, name, config_dirs)
        except UserError:
            return set()  # a choice that this machine does not have, and that the command line replaces

    def unknown(self, key: str, known: Sequence[str]) -> UserError:
        """The error for a key that no part of the job takes."""
        hint = nearest(key, known)
        guess = f" Did you mean {hint!r}?" if hint else ""
        return UserError(f"{self.shown}: the key {key!r} is unknown.{guess}")


def read_job_file(path: Path) -> JobFile:
    """A job.yaml. Raises UserError that names the file where it is not one."""
    if path.is_dir() and (path / "job.yaml").is_file():
        raise UserError(f"job={path}: a folder. Did you mean job={path / 'job.yaml'}?")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = nearest(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.is_dir() else None
        guess = f" Did you mean {str(path.parent / near)!r}?" if near else ""
        raise UserError(f"job={path}: no such file.{guess}") from None
    except OSError as error:
        raise UserError(f"job={path}: not readable: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"job={path}: not readable as YAML: {one_line(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("choices"), dict):
        found = (
            "no `choices`" if isinstance(content, dict) else "an empty file" if content is None else "something else"
        )
        raise UserError(
            f"job={path}: expected a job.yaml, a mapping with each group's choice in `choices`; found {found}"
        )
    return _checked(path, content)


def _checked(path: Path, content: dict[Any, Any]) -> JobFile:
    choices = content.pop("choices")
    for group, name in choices.items():
        if group not in ROOMS:
            raise UserError(f"job={path}: choices: {unknown('the group', str(group), ROOMS)}")
        if not isinstance(name, str | int):
            raise UserError(f"job={path}: choices.{group}: expected a name, found {name!r}")
    for key, value in content.items():
        if key in ROOMS and not isinstance(value, dict):
            raise UserError(f"job={path}: {key}: expected the mapping of its options, found {value!r}")
    return JobFile(path, {g: str(c) for g, c in choices.items()}, {str(k): v for k, v in content.items()})
