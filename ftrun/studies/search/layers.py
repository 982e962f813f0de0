"""Which layers, modules or kinds of module are worth training: ranked by one probing pass, then confirmed by training.

The probe (ftrun/tasks/probe.py) gives each place that the job trains a score; the best set under the budget is
trained, and beside it sets of the same size evenly spaced and drawn at random, and all of it. The job's own `targets`
and `layers` say what there is to choose from.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ftrun.errors import UserError
from ftrun.schema import option
from ftrun.studies.places import CHOICES, Item, asked, best, drawn, items_of, override, spread
from ftrun.studies.searching import Outcome, Trial, grid
from ftrun.studies.searching import Search as Base
from ftrun.studies.study import Axis

_TOP = 5  # layers and kinds that the ranking names


@dataclass(frozen=True)
class Options:
    grows: ClassVar[tuple[str, ...]] = ("search.repeats",)
    budget: float = option(8, "how much may train, in `unit`", gt=0)
    unit: str | None = option(
        None,
        "what the budget counts; null: what is chosen",
        choices=("layers", "modules", "kinds", "parameters", "bytes"),
    )
    choose: str = option("layers", "what is taken or left", choices=("layers", "modules", "kinds"))
    rows: int = option(32, "rows of the training data that are probed", ge=2)
    against: list[str] = option(
        ["uniform", "random", "all"], "what is trained to compare with", choices=("uniform", "random", "all")
    )
    repeats: int = option(1, "sets drawn at random", ge=1)
    seed: int = option(0, "seed of the draws", ge=0, le=2**32 - 1)

    def __post_init__(self) -> None:
        units = CHOICES[self.choose][1]
        if self.counted not in units:
            raise UserError(f"search.unit={self.unit}: with search.choose={self.choose} expected {', '.join(units)}")
        if self.repeats > 1 and "random" not in self.against:
            raise UserError(f"search.repeats={self.repeats}: has no effect without random in search.against")

    @property
    def counted(self) -> str:
        """What the budget counts."""
        return self.unit or self.choose


class Search(Base):
    """First the probe, then the sets, one after the other. A swept `seed` trains each of them with every value."""

    depends = True
    retries = True

    def __init__(self, options: Options, axes: Sequence[Axis], overrides: Sequence[str]) -> None:
        super().__init__(options, axes, overrides)
        swept = [axis.key for axis in axes if axis.key != "seed"]
        if swept:
            raise UserError(
                f"search=layers ranks the parts of one job: give {swept[0]} one value (seed alone may have several; "
                "which layers and targets there are to choose from, layers= and targets= say)"
            )
        self._seeds = list(grid(axes))
        self._key = CHOICES[options.choose][0]
        probe = Trial(0, self._seeds[0], kind="probe", note="probe", request={"rows": options.rows, "by": self._key})
        self._trials, self._asked = [probe], 0
        self._probe: Mapping[str, Any] = {}
        self._items: list[Item] = []
        self._sets: dict[str, list[Item]] = {}  # by note
        self._told: dict[str, list[Outcome]] = {}
        self._trouble: str | None = None

    def ask(self) -> Trial | None:
        if self._asked == len(self._trials):
            return None
        self._asked += 1
        return self._trials[self._asked - 1]

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        if trial.kind == "train":
            self._told.setdefault(trial.note, []).append(outcome)
        elif outcome.probe is None:
            self._trouble = outcome.reason or outcome.status
        else:
            self._choose(outcome.probe)

    def points(self) -> list[Mapping[str, str]]:
        if self._sets:
            return [trial.values for trial in self._trials if trial.kind == "train"]
        # before the probe only the job itself is known; it is the same as "all"
        return list(self._seeds) if "all" in self.options.against else []

    def sentences(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        del rows  # it was told all of them
        if self._trouble is not None:
            return [f"search=layers: the probe gave no ranking: {self._trouble}"]
        if not self._sets:
            return []
        return [self._ranking(), self._choice(), *self._verdict(), *map(self._costs, self._told)]

    # --- the sets ---

    def _choose(self, probe: Mapping[str, Any]) -> None:
        """The sets that are trained. Raises UserError where the budget leaves nothing to choose."""
        o = self.options
        if o.counted == "bytes" and not probe["adapter"]:
            raise UserError("search.unit=bytes: this method hands over a whole model and no adapter; use parameters")
        items = items_of(probe["places"], o.choose, o.counted)
        chosen = best(items, o.budget)
        cheapest, total = min(item.cost for item in items), sum(item.cost for item in items)
        if not chosen or len(chosen) == len(items):
            least = f"the least of them {_number(cheapest)}"
            needs = f"the {len(items)} {o.choose} of the job have {_number(total)} {o.counted}, {least}"
            few = "nothing fits" if not chosen else "everything fits, so that nothing is left to choose"
            raise UserError(f"budget={_number(o.budget)} {o.counted}: {few}; {needs}")
        size = sum(item.cost for item in chosen)  # what the others may cost
        self._probe, self._items, self._sets = probe, items, {"chosen": chosen}
        if "uniform" in o.against:
            self._sets["uniform"] = spread(items, size)
        if "all" in o.against:
            self._sets["all"] = items
        if "random" in o.against:
            for n in range(o.repeats):
                self._sets[f"random {n + 1}" if n else "random"] = drawn(items, size, f"{o.seed} {n}")
        for note, found in self._sets.items():
            value = asked(probe["asked"][self._key]) if note == "all" else override(found, o.choose)
            for seed in self._seeds:
                self._trials.append(Trial(len(self._trials), {**seed, self._key: value}, note=note))

    # --- in words ---

    def _ranking(self) -> str:
        """Which layers and which kinds hold most of the fall."""
        places = self._probe["places"]
        total = sum(max(0.0, place["score"]) for place in places) or 1.0

        def top(key: str, word: str) -> str:
            shares: dict[Any, float] = {}
            for place in places:
                if place[key] is not None:
                    shares[place[key]] = shares.get(place[key], 0.0) + place["score"] / total
            ranked = sorted(shares, key=lambda one: -shares[one])
            shown = ", ".join(f"{one} ({100 * shares[one]:.3g} %)" for one in ranked[:_TOP])
            return f"{word} {shown}{', …' if len(ranked) > _TOP else ''}"

        fall = f"a step lowers the loss by the gradients of {self._probe['rows']} rows"
        return f"where {fall}: {top('layer', 'in the layers')}; {top('kind', 'in')}"

    def _choice(self) -> str:
        """The chosen set, its share, and the override that takes it."""
        chosen, o = self._sets["chosen"], self.options
        share = sum(item.score for item in chosen) / (sum(item.score for item in self._items) or 1.0)
        part = sum(item.parameters for item in chosen) / sum(item.parameters for item in self._items)
        cost = sum(item.cost for item in chosen)
        used = "" if o.counted == o.choose else f", {_number(cost)} of {_number(o.budget)} {o.counted}"
        value = override(chosen, o.choose)
        typed = f"'{self._key}={value}'" if value.startswith("re:") else f"{self._key}={value}"
        return (
            f"chosen: {typed}: {len(chosen)} of {len(self._items)} {o.choose}{used}, with {100 * share:.3g} % of that "
            f"fall in {100 * part:.3g} % of the parameters"
        )

    def _verdict(self) -> list[str]:
        """Whether selection paid, in held-out loss."""
        found = {name: self._losses(name) for name in ("chosen", "uniform", "random", "all")}
        mine = found.pop("chosen")
        everything = found.pop("all")
        words = [f"{_mean(losses)} of {name}" for name, losses in found.items() if losses]
        if not mine:
            return ["whether selection paid is not known: the chosen set has no held-out loss"]
        if everything:
            words.append(f"{_mean(everything)} of all")
        rivals = {name: statistics.fmean(losses) for name, losses in found.items() if losses}
        said = f"held-out loss {_mean(mine)}" + (f" against {', '.join(words)}" if words else "")
        if not rivals:
            return [said]
        name = min(rivals, key=lambda one: rivals[one])
        gain = rivals[name] - statistics.fmean(mine)
        noise = max((statistics.stdev(losses) for losses in (mine, *found.values()) if len(losses) > 1), default=0.0)
        within = ", less than such sets differ by among themselves" if 0 < abs(gain) < noise else ""
        if gain > 0:
            return [f"selection paid: {said}; {gain:.4f} below {name}{within}"]
        same = self._sets.get(name) == self._sets["chosen"]
        why = f"{name} is the same set" if same else f"{name} is {-gain:.4f} lower{within}"
        return [f"selection did not pay: {said}; {why}"]

    def _losses(self, name: str) -> list[float]:
        """Held-out losses of a set with every seed; of "random", of all sets drawn."""
        told = (outcomes for note, outcomes in self._told.items() if note.split()[0] == name)
        return [one.figures["loss"] for outcomes in told for one in outcomes if "loss" in one.figures]

    def _costs(self, note: str) -> str:
        """What a set is, where that is short, and what it needs."""
        outcomes = self._told[note]
        value = next(trial.values[self._key] for trial in self._trials if trial.note == note)
        name = f"{note} ({self._key}={value})" if note != "chosen" and not value.startswith("re:") else note
        found = [one.figures for one in outcomes if one.status == "finished"]
        if not found:
            return f"{name}: {outcomes[0].status}: {outcomes[0].reason}"
        speeds = [f["tokens_per_s"] for f in found if f.get("tokens_per_s")]
        words = [f"{found[0]['trainable_params']:,} parameters"] if "trainable_params" in found[0] else []
        words += [f"{found[0]['peak_bytes'] / 1e9:.3g} GB"] if "peak_bytes" in found[0] else []
        words += [f"{statistics.fmean(speeds):,.0f} tokens/s"] if speeds else []
        return f"{name}: {', '.join(words)}"


def _mean(losses: Iterable[float]) -> str:
    """The mean, with its deviation where there are several."""
    every = list(losses)
    spread_by = f" ± {statistics.stdev(every):.4f}" if len(every) > 1 else ""
    return f"{statistics.fmean(every):.4f}{spread_by}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"
