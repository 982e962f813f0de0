"""Optuna's samplers and pruners by their names, made of options as they are typed."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ftrun.errors import UserError, unknown
from ftrun.groups import one_line

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study

_STARTUP = "n_startup_trials"  # what Optuna calls the trials before it begins to judge
_REHEARSED = 4  # made-up trials
# what a module is called where it is installed from
_PACKAGES = {"sklearn": "scikit-learn"}


def sampler(name: str, given: Mapping[str, Any], seed: int, startup: int | None = None) -> BaseSampler:
    """The sampler of a name. Raises UserError on an unknown name or option, and where a package is missing."""
    cls = _sampler(name)
    return _make("sampler", name, cls, {**_started(cls, startup), **given}, seed=seed)


def pruner(name: str, given: Mapping[str, Any], startup: int | None = None) -> BasePruner:
    """The pruner of a name, as `sampler`. Options that are pruners themselves are given by their names."""
    cls = _pruner(name)
    within = [key for key, one in _parameters(cls).items() if "Pruner" in str(one.annotation)]
    made = {key: pruner(str(given.get(key, "none")), {}) for key in within}
    return _make("pruner", name, cls, {**_started(cls, startup), **given, **made})


def prunes(name: str) -> bool:
    """Whether the pruner of a name ever stops a trial. Raises UserError on an unknown name."""
    return _pruner(name).__name__ != "NopPruner"


def check_space(sampler_name: str, distributions: Mapping[str, Any]) -> None:
    """UserError where a sampler finds nothing in a space that it can search, and would draw all of it at random."""
    from optuna.distributions import CategoricalDistribution

    choices = [key for key, one in distributions.items() if isinstance(one, CategoricalDistribution)]
    if _sampler(sampler_name).__name__ == "CmaEsSampler" and len(choices) == len(distributions):
        raise UserError(
            f"search.sampler={sampler_name} searches numbers alone, as KEY=interval(LOW,HIGH) or evenly spaced points; "
            f"{', '.join(choices)}: none is"
        )


def starts_up(sampler_name: str, pruner_name: str) -> bool:
    """Whether one of the two lets a number of trials go by before it begins."""
    return any(_STARTUP in _parameters(cls) for cls in (_sampler(sampler_name), _pruner(pruner_name)))


def blind(name: str, given: Mapping[str, Any], startup: int | None, trials: int) -> int:
    """How many of `trials` are drawn whatever the earlier ones came to, as far as that is certain."""
    cls = _sampler(name)
    if cls.__name__ == "RandomSampler":
        return trials
    if _STARTUP not in _parameters(cls):
        return 0
    usual = _parameters(cls)[_STARTUP].default if startup is None else startup
    return min(trials, int(given.get(_STARTUP, usual)))


def rehearse(study: Study, distributions: Mapping[str, Any], what: str) -> None:
    """Some made-up trials: what a sampler or a pruner lacks or cannot search shows before anything has run.

    study: one that is thrown away. Raises UserError, which names `what`.
    """
    several = len(study.directions) > 1
    try:
        for number in range(_REHEARSED):
            trial = study.ask(dict(distributions))
            for step in () if several else range(1, _REHEARSED):
                trial.report(number + 1 / step, step)
                trial.should_prune()
            tell(study, trial.number, [float(number)] * len(study.directions))
    except ImportError as error:
        raise _lacking(what, error) from error
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError) as error:
        raise UserError(f"{what}: {one_line(error)}") from error


def tell(study: Study, number: int, values: list[float] | None = None, state: Any = None) -> bool:
    """Tell a study how a trial ended; False where its sampler has nothing left to draw."""
    try:
        study.tell(number, values, state=state)
    except RuntimeError as error:
        if "Study.stop" not in str(error):  # what a sampler that is through calls, and a study that is asked refuses
            raise
        return False
    return True


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without Optuna's warnings: of what is experimental, deprecated, or reported twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _sampler(name: str) -> type:
    from optuna import samplers

    found = _classes(samplers, "Sampler")
    return _find("sampler", name, {k: c for k, c in found.items() if "seed" in _parameters(c) and not _required(c, {})})


def _pruner(name: str) -> type:
    from optuna import pruners

    found = _classes(pruners, "Pruner")
    return _find("pruner", name, {**found, "none": found.pop("nop"), "halving": found.pop("successivehalving")})


def _classes(module: Any, ending: str) -> dict[str, type]:
    """{"tpe": TPESampler, …}: what a module offers of a kind."""
    found = [getattr(module, name) for name in module.__all__ if name.endswith(ending)]
    return {c.__name__.removesuffix(ending).lower(): c for c in found if not inspect.isabstract(c)}


def _find(what: str, name: str, classes: Mapping[str, type]) -> type:
    plain = name.lower().replace("_", "").replace("-", "").removesuffix(what)
    if plain not in classes:
        raise UserError(unknown(f"search.{what}={name}: the {what}", name, classes, listed=24))
    return classes[plain]


def _make(what: str, name: str, cls: type, given: Mapping[str, Any], **ours: Any) -> Any:
    takes = set(_parameters(cls)) - set(ours)
    for key in given:
        if key not in takes:
            message = f"search.{what}_options: {what}={name}"
            raise UserError(unknown(f"{message}: the option", key, takes) if takes else f"{message} has none")
    if missing := _required(cls, given):
        raise UserError(f"search.{what}={name} needs 'search.{what}_options={{{missing[0]}: …}}'")
    try:
        return cls(**given, **ours)
    except ImportError as error:
        raise _lacking(f"search.{what}={name}", error) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"search.{what}_options={dict(given)}: {one_line(error)}") from error


def _started(cls: type, startup: int | None) -> dict[str, int]:
    return {_STARTUP: startup} if startup is not None and _STARTUP in _parameters(cls) else {}


def _parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls).parameters


def _required(cls: type, given: Mapping[str, Any]) -> list[str]:
    empty = inspect.Parameter.empty
    return [key for key, one in _parameters(cls).items() if one.default is empty and key not in given]


def _lacking(what: str, error: ImportError) -> UserError:
    """Which package is missing, and how to get it; Optuna wraps the import's own error in one of its own."""
    cause = error if error.name else error.__cause__
    module = str(getattr(cause, "name", None) or "").partition(".")[0]
    if not module:
        return UserError(f"{what}: {one_line(error)}")
    package = _PACKAGES.get(module, module)
    return UserError(f"{what} needs the package {package}, which is not installed. Get it: pip install {package}")
