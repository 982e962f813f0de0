"""Optuna asked and told: its samplers draw the points, its pruners stop what lags behind at the evaluations on the way.

Nothing of it is stored: a study that goes on is asked and told everything again, and draws the same (Akiba et al.,
Optuna, 2019, arXiv:1907.10902).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftrun.errors import UserError
from ftrun.schema import option
from ftrun.studies.search import by_name, spaces
from ftrun.studies.searching import OBJECTIVES, Outcome, Trial, shared
from ftrun.studies.searching import Search as Base
from ftrun.studies.study import Axis

if TYPE_CHECKING:
    import optuna

_TOP = 5  # trials that PED-ANOVA calls good, at least
_TELLING = 10  # finished trials from which on it is told what mattered


@dataclass(frozen=True)
class Options:
    grows: ClassVar[tuple[str, ...]] = ("search.trials",)
    trials: int = option(20, "trials to make", ge=1)
    seed: int = option(0, "seed of the draws", ge=0, le=2**32 - 1)
    objectives: list[str] = option(["loss"], "figures to aim at", choices=tuple(OBJECTIVES))
    sampler: str = option("tpe", "who draws: a sampler of Optuna's, by its name")
    sampler_options: dict[str, Any] = option({}, "what else the sampler takes, by Optuna's names")
    pruner: str = option("none", "who stops trials at their evaluations: a pruner of Optuna's, or none")
    pruner_options: dict[str, Any] = option({}, "what else the pruner takes, by Optuna's names")
    at_once: int = option(4, "trials that are asked for before the first of them is told, where so many can run", ge=1)
    startup: int | None = option(None, "trials before sampler and pruner begin to judge; null: Optuna's own", ge=1)

    def __post_init__(self) -> None:
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise UserError(f"search.objectives={self.objectives}: expected one or more names, each once")


class Search(Base):
    """A study of Optuna's in memory. With one worker the same seed gives the same trials."""

    depends = True

    @property
    def at_once(self) -> int:
        return int(self.options.at_once)

    def __init__(self, options: Options, axes: Sequence[Axis], overrides: Sequence[str]) -> None:
        super().__init__(options, axes, overrides)
        if not axes:
            raise UserError("search=optuna: nothing is swept; write KEY=a,b,c or KEY=interval(LOW,HIGH)")
        _load()
        self._check()
        self._space = spaces.space(axes)
        by_name.check_space(options.sampler, self._space)
        self._prunes = by_name.prunes(options.pruner)
        with by_name.quietly():
            by_name.rehearse(self._made(1), self._space, f"search.sampler={options.sampler}")
            self.study = self._made(options.startup)
            self._certain = self._blind()
        self._trials: dict[int, optuna.Trial] = {}
        self._verdicts: dict[int, dict[int, bool]] = {}  # by trial and step
        self._lacking: Counter[str] = Counter()  # objectives that finished trials have no figure of
        self._through = False

    @property
    def more(self) -> bool:
        return len(self._certain) < self.options.trials

    def ask(self) -> Trial | None:
        if self._through or len(self._trials) == self.options.trials:
            return None
        with by_name.quietly():
            drawn = self.study.ask(self._space)
        self._trials[drawn.number] = drawn
        return Trial(drawn.number, spaces.values(self.axes, drawn.params), asks=self._prunes)

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        from optuna.trial import TrialState

        found = {name: outcome.figures.get(name) for name in self.options.objectives}
        figures = {name: math.nan if figure is None else float(figure) for name, figure in found.items()}
        lacking = [name for name, figure in figures.items() if not math.isfinite(figure)]
        with by_name.quietly():
            if outcome.status == "finished" and not lacking:
                told = by_name.tell(self.study, trial.number, list(figures.values()))
            else:
                state = TrialState.PRUNED if outcome.status == "pruned" else TrialState.FAIL
                told = by_name.tell(self.study, trial.number, state=state)
        self._lacking.update(lacking if outcome.status == "finished" else ())
        self._through = not told

    def verdict(self, trial: Trial, step: int, loss: float) -> bool:
        said = self._verdicts.setdefault(trial.number, {})
        if step not in said:  # a trial that was cut off comes by a second time; what was said holds
            with by_name.quietly():
                self._trials[trial.number].report(loss, step)
                said[step] = not self._trials[trial.number].should_prune()
        return all(said.values())

    def points(self) -> list[Mapping[str, str]]:
        return list(self._certain)

    def sentences(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        names = self.options.objectives
        done = [r for r in rows if r["status"] == "finished" and all(r["figures"].get(n) is not None for n in names)]
        found = [_best(done, names)] if done and names != ["loss"] else []  # the table says which loss is the lowest
        for name, count in self._lacking.items():
            found.append(f"{count} finished trials have no {name}: to Optuna they count as failed")
        return [*found, *self._mattered()]

    def _check(self) -> None:
        """UserError where what is asked for could not be judged."""
        options, fixed = self.options, {axis.key for axis in self.axes}
        if "loss" in options.objectives and shared(self.overrides, "eval") == "none":
            raise UserError("search.objectives: loss is the held-out loss, and eval=none measures none")
        if options.startup is not None and not by_name.starts_up(options.sampler, options.pruner):
            who = f"sampler={options.sampler} nor pruner={options.pruner}"
            raise UserError(f"search.startup={options.startup}: neither {who} has trials to start with")
        if not by_name.prunes(options.pruner):
            return
        what = f"search.pruner={options.pruner}: trials are judged by their held-out loss on the way"
        if options.objectives != ["loss"]:
            raise UserError(f"{what}, that of one objective: search.objectives=[loss], or search.pruner=none")
        if "eval.every" not in fixed and shared(self.overrides, "eval.every") is None:
            raise UserError(f"{what}, and none is measured there: add eval.every=STEPS")

    def _made(self, startup: int | None) -> optuna.Study:
        import optuna

        o = self.options
        return optuna.create_study(
            study_name="ftrun",  # Hyperband deals trials out by it
            sampler=by_name.sampler(o.sampler, o.sampler_options, o.seed, startup),
            pruner=by_name.pruner(o.pruner, o.pruner_options, startup),
            directions=["minimize" if OBJECTIVES[name] else "maximize" for name in o.objectives],
        )

    def _blind(self) -> list[Mapping[str, str]]:
        """The draws before the sampler learns: those of a study that is told nothing."""
        o = self.options
        unheard = self._made(o.startup)
        count = by_name.blind(o.sampler, o.sampler_options, o.startup, o.trials)
        return [spaces.values(self.axes, unheard.ask(self._space).params) for _ in range(count)]

    def _mattered(self) -> Iterator[str]:
        """How much of each objective's differences the keys explain."""
        from optuna.trial import TrialState

        count = len(self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        if count < _TELLING or len(self.axes) < 2:
            return
        for index, name in enumerate(self.options.objectives):
            with by_name.quietly():
                shares, by = _importances(self.study, index, list(self._space), count)
            if shares:
                words = ", ".join(f"{key} {share:.0%}" for key, share in shares.items())
                yield f"What mattered for {name}, as far as {count} trials tell ({by}): {words}"


def _load() -> None:
    """Optuna, and it silent."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("search=optuna needs Optuna. Get it: pip install 'ftrun[optuna]'") from error
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)


def _importances(study: optuna.Study, index: int, keys: list[str], count: int) -> tuple[dict[str, float], str]:
    """Each key's share, the largest first, and the name of the method; nothing where all trials came to the same."""
    from optuna import importance
    from optuna.study import StudyDirection

    sign = 1.0 if study.directions[index] == StudyDirection.MINIMIZE else -1.0
    top = max(0.1, min(0.5, _TOP / count))
    evaluator: importance.BaseImportanceEvaluator
    try:
        evaluator, by = importance.FanovaImportanceEvaluator(seed=0), "fANOVA"
    except ImportError:  # without scikit-learn
        evaluator, by = importance.PedAnovaImportanceEvaluator(target_quantile=top), f"PED-ANOVA of the best {top:.0%}"
    if len({trial.values[index] for trial in study.trials if trial.values}) < 2:
        return {}, by
    made = importance.get_param_importances(
        study, evaluator=evaluator, params=keys, target=lambda trial: sign * trial.values[index]
    )
    return made, by


def _best(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The best row, or those that no other one is better than in everything at once."""
    if len(names) == 1:
        (name,) = names
        best = min(rows, key=lambda row: _costs(row, names))
        words = " ".join(f"{key}={value}" for key, value in best["values"].items())
        return f"The best {name} of {len(rows)} trials is row {best['number']}'s ({words}): {best['figures'][name]:.6g}"
    front = [row for row in rows if not any(_dominates(other, row, names) for other in rows)]
    numbers = ", ".join(str(row["number"]) for row in front)
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    word = "rows" if len(front) > 1 else "row"
    return f"Pareto front of {listed}, where one gets better only as another gets worse: {word} {numbers}"


def _dominates(one: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str]) -> bool:
    mine, theirs = _costs(one, names), _costs(other, names)
    return mine != theirs and all(m <= t for m, t in zip(mine, theirs, strict=True))


def _costs(row: Mapping[str, Any], names: Sequence[str]) -> tuple[float, ...]:
    return tuple(row["figures"][n] if OBJECTIVES[n] else -row["figures"][n] for n in names)
