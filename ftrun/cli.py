"""The command line: a verb, then Hydra's overrides. Chooses, composes, hands over; no logic of its own."""

from __future__ import annotations

import sys

try:
    import importlib
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from ftrun.errors import Interrupted, RunFailed, UserError, nearest, unknown
    from ftrun.secrets import hide
    from ftrun.train.interrupt import hides_interruption, terminable
except KeyboardInterrupt:  # before `main` could answer it
    print("ftrun: interrupted", file=sys.stderr)
    sys.exit(130)

# verb -> its task: a module with `run(job, **options) -> exit code`; its docstring is the verb's help, and a class
# `Options`, where it has one, says what the verb takes besides the job's keys
_NAMES = ("train", "plan", "fit", "data", "eval", "generate", "merge", "check", "push", "report", "doctor")
VERBS = {name: f"ftrun.tasks.{name}" for name in _NAMES} | {"eval": "ftrun.tasks.evaluate"}
# verbs without a job -> what they take instead: `run(words, **options)`
INSTEAD = {"report": "DIR...", "doctor": ""}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code (0, 2, 3, 4, 130: see ftrun.errors)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = any(word.lower() == "debug=true" for word in given)
    try:
        with terminable():
            return _dispatch(given)
    except (RunFailed, Interrupted) as error:
        if debug:
            raise
        print(f"ftrun: {hide(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print("ftrun: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of a pipe left: not our failure, and nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        told: Exception = Interrupted("interrupted") if hides_interruption(error) else error
        if debug or not isinstance(told, UserError | Interrupted):
            raise
        print(f"ftrun: {hide(str(told))}", file=sys.stderr)
        return told.exit_code


def _dispatch(given: list[str]) -> int:
    from ftrun import hydra_flags

    flags = hydra_flags.split(given)
    if "--shell-completion" in flags.valued:
        from ftrun.completion import answer

        return answer(flags.valued["--shell-completion"], list(VERBS))
    if "--version" in flags.alone:
        from importlib.metadata import version

        print(f"ftrun {version('ftrun')}")
        return 0
    verb, overrides = _verb(flags.words)
    if "--help" in flags.alone:
        from ftrun.help import show

        return show(verb, {name: task_file(name) for name in VERBS}, overrides, flags.config_dirs, INSTEAD)
    if verb in INSTEAD:
        return _without_job(verb, overrides, [*flags.alone, *flags.valued])
    if flags.valued.get("--cfg") == "job":
        _, overrides = verb_options(verb or "train", overrides)
        resolve = "--resolve" in flags.alone
        return hydra_flags.show_job(overrides, flags.config_dirs, flags.valued.get("--package"), resolve)
    if {"--cfg", "--info"} & flags.valued.keys():
        return hydra_flags.hand_over(flags, verb_options(verb or "train", overrides)[1])
    if "--multirun" in flags.alone:
        return _study(verb or "train", overrides, flags.config_dirs)
    if verb in (None, "train") and any(word.startswith("launcher=") for word in overrides):
        return _launched(overrides, flags.config_dirs)
    return run_verb(verb or "train", overrides, flags.config_dirs)


def _launched(overrides: Sequence[str], config_dirs: Sequence[Path]) -> int:
    """launcher=… without -m: a study of one job."""
    from ftrun.compose import compose_alone
    from ftrun.studies import run

    compose_alone([word for word in overrides if not word.startswith(("launcher=", "launcher."))], config_dirs).check()
    return run.run(overrides, config_dirs)


def _study(verb: str, overrides: Sequence[str], config_dirs: Sequence[Path]) -> int:
    """-m: a study of jobs, its plan, or another verb on each of its points."""
    own, rest = verb_options(verb, overrides)
    if verb == "train":
        from ftrun.studies import run

        return run.run(rest, config_dirs)
    if verb == "plan":
        from ftrun.studies import run

        return run.plan(rest, config_dirs, own["format"])
    from ftrun.tasks.multirun import run_all

    given = [word for word in overrides if word not in rest]
    return run_all([verb, *given], rest, config_dirs)


def _verb(words: list[str]) -> tuple[str | None, list[str]]:
    """(the verb, None where none is given; the overrides)."""
    first = words[0] if words else "="
    if "=" in first or first.startswith(("~", "+")):
        return None, words
    if first not in VERBS:
        raise UserError(unknown("the verb", first, VERBS) + f". A key is set as KEY=VALUE: {first}=…")
    return first, words[1:]


def run_verb(verb: str, overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> int:
    """Compose the job and run the verb's task on it."""
    from ftrun.compose import UnknownKey, compose_alone

    own, overrides = verb_options(verb, overrides)
    try:
        job = compose_alone([*_of_run(verb, own), *overrides], config_dirs)
    except UnknownKey as error:
        near = nearest(error.key, filter(None, [*own, error.near])) or error.near
        raise UnknownKey(error.key, near, "" if verb == "train" else verb) from None
    job.check()
    return int(importlib.import_module(VERBS[verb]).run(job, **own))


def _of_run(verb: str, own: Mapping[str, Any]) -> list[str]:
    """run=DIR: the job starts from what the run's folder holds."""
    if "run" not in own:
        return []
    from ftrun.runs import job_file

    # of several adapters the first one's run says what the base is
    found = own["run"] or next(iter(own.get("adapters", {}).values()), None)
    if found is None:
        raise UserError(f"run is missing: ftrun {verb} run=DIR, the folder of a finished run")
    return [f"job={job_file(Path(found))}"]


def _without_job(verb: str, words: Sequence[str], flags: Sequence[str]) -> int:
    """A verb that composes no job: its words are its own."""
    if flags:
        raise UserError(f"{flags[0]}: ftrun {verb} takes {INSTEAD[verb]} and composes no job; see ftrun {verb} --help")
    own, rest = verb_options(verb, [word for word in words if not word.lower().startswith("debug=")])
    return int(importlib.import_module(VERBS[verb]).run(rest, **own))


def task_file(verb: str) -> Path:
    """The file of a verb's task, found without importing it."""
    return Path(__file__).parent.joinpath(*VERBS[verb].split(".")[1:]).with_suffix(".py")


def verb_options(verb: str, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(the verb's own options, typed and with defaults; the overrides that are left for the job)."""
    import dataclasses

    import yaml

    from ftrun import schema
    from ftrun.help import verb_options as declared
    from ftrun.shell import is_text, plain

    cls = declared(task_file(verb))
    if cls is None:
        return {}, list(overrides)
    fields, hints = schema.fields_by_key(cls), schema.field_types(cls)
    values: dict[str, Any] = {}
    rest: list[str] = []
    for text in overrides:
        key, _, value = text.partition("=")
        if key in fields:
            try:
                values[key] = plain(key, value) if is_text(key, value) else yaml.safe_load(value)
            except (yaml.YAMLError, ValueError, RecursionError) as error:
                raise UserError(
                    f"{text[:120]}: expected {schema.describe(hints[key], fields[key].metadata)}"
                ) from error
        else:
            rest.append(text)
    made = schema.build(cls, values)
    return {field.name: getattr(made, field.name) for field in dataclasses.fields(cls)}, rest


if __name__ == "__main__":
    sys.exit(main())
