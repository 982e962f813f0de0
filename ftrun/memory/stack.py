"""Few layers run, all of them known: a step's memory over a stack of equal layers, extended exactly.

In a run of equal layers each one holds the same bytes, and adds the same in the forward pass and in the backward pass
to all that comes after it; only the outermost may differ, by what lies before and behind them. So a step is run with
KEEP layers of each run, and what one of the middle adds is added for each of those that were left out.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ftrun.memory.track import BACKWARD, FORWARD, ROUNDING, Instant, Moment, Segment

KEEP = 4  # two at either end of a run: the outermost, and one whose neighbours are like itself
_LONGEST = 12  # layers of a pattern that repeats (Gemma 3: five with a window, one without)


@dataclass(frozen=True)
class Run:
    """`repeats` times the same `period` layers, from layer `start` on."""

    start: int
    period: int
    repeats: int

    @property
    def kept(self) -> int:
        """The repeats that are run."""
        return KEEP if self.repeats > KEEP + 1 else self.repeats

    @property
    def left_out(self) -> int:
        """The repeats that are not run."""
        return self.repeats - self.kept

    def layers(self, more: int = 0) -> list[int]:
        """The layers that are run: those of the first repeats and of the last; more: how many in between."""
        head = KEEP // 2 + more if self.left_out else self.repeats
        chosen = [*range(head), *range(self.repeats - self.kept + head - more, self.repeats)]
        return [self.layer(repeat, place) for repeat in chosen for place in range(self.period)]

    def layer(self, repeat: int, place: int) -> int:
        """The number of a layer."""
        return self.start + repeat * self.period + place

    @property
    def low(self) -> int:
        """The last repeat that is run before those that are left out."""
        return KEEP // 2 - 1

    @property
    def high(self) -> int:
        """The first repeat that is run after them."""
        return self.repeats - KEEP // 2


def runs(signatures: Sequence[Hashable]) -> list[Run]:
    """The layers as runs: at each layer the pattern that covers most, where it repeats often enough to gain by it."""
    found, at = [], 0
    while at < len(signatures):
        best = Run(at, 1, 1)
        for period in range(1, _LONGEST + 1):
            repeats = _repeats(signatures, at, period)
            if repeats > KEEP + 1 and repeats * period > best.repeats * best.period:
                best = Run(at, period, repeats)
        found.append(best)
        at += best.period * best.repeats
    return found


def _repeats(signatures: Sequence[Hashable], at: int, period: int) -> int:
    pattern = signatures[at : at + period]
    count = 1
    while len(pattern) == period and signatures[at + count * period : at + (count + 1) * period] == pattern:
        count += 1
    return count


def extend(stack: Sequence[Run], few: Sequence[Segment], held: Mapping[Run, Moment]) -> list[Segment]:
    """The segments of the whole stack, in order.

    few: those of a step with the kept layers. held: what one repeat of a run holds throughout a step: its weights and
    their optimiser state.
    """
    extra = grown(Moment(), held)
    known = {segment.instant: segment for segment in few}
    jumps = {after: (run, before) for run in stack if run.left_out for after, before in _gaps(run, few)}
    found: list[Segment] = []
    for segment in few:
        if segment.instant in jumps:
            run, before = jumps[segment.instant]
            step = segment.start.less(known[before].start)
            found += _between(run, known, segment.instant, extra, step)
            extra = extra.plus(step, run.left_out)
        found.append(_raised(segment, segment.instant, extra))
    return found


def even(stack: Sequence[Run], few: Sequence[Segment]) -> bool:
    """Whether a layer that was left out lets go in the backward passes what it took in the forward ones, but for its
    gradients. Only then is the rest of the step the same however many layers there are."""
    known = {segment.instant: segment for segment in few}
    for run in (run for run in stack if run.left_out):
        left = Moment()
        for after, before in _gaps(run, few):
            left = left.plus(known[after].start.less(known[before].start))
        if any(size for role, size in left.by_role.items() if role not in ("gradients", ROUNDING)):
            return False
    return True


def grown(few: Moment, held: Mapping[Run, Moment]) -> Moment:
    """A moment of the whole stack, from one in which layers hold what they always do."""
    for run, each in held.items():
        few = few.plus(each, run.left_out)
    return few


def _gaps(run: Run, few: Sequence[Segment]) -> Iterator[tuple[Instant, Instant]]:
    """The segments before which repeats are left out, each with the one that stands where it does a repeat before."""
    last = run.period - 1
    for segment in few:
        name, part, layer = segment.instant.name, segment.instant.part, segment.instant.layer
        if name == FORWARD and layer == run.layer(run.high, 0):
            yield segment.instant, Instant(name, part, run.layer(run.low, 0))
        if name == BACKWARD and layer == run.layer(run.low, last):
            yield segment.instant, Instant(name, part, run.layer(run.high, last))


def _between(
    run: Run, known: Mapping[Instant, Segment], after: Instant, extra: Moment, step: Moment
) -> Iterator[Segment]:
    """The segments of the layers that were left out before `after`."""
    forward = after.name == FORWARD
    places = range(run.period) if forward else range(run.period - 1, -1, -1)
    for distance in range(1, run.left_out + 1):
        level = extra.plus(step, distance)
        for place in places:
            anchor = run.layer(run.low if forward else run.high, place)
            number = anchor + (distance if forward else -distance) * run.period
            like = known[Instant(after.name, after.part, anchor)]
            yield _raised(like, Instant(after.name, after.part, number), level)


def _raised(segment: Segment, instant: Instant, extra: Moment) -> Segment:
    return Segment(instant, segment.start.plus(extra), segment.peak.plus(extra), cost=segment.cost)
