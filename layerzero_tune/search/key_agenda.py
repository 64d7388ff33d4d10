"""The agenda of one static key: what may be measured next under it, ranked."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Operation, Sizes
from layerzero_tune.compile.regret import RegretModel
from layerzero_tune.measure.contest import Contest
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.search.between import Between, points_between
from layerzero_tune.search.configurations.searched import Searched
from layerzero_tune.search.contest_time import (
    CallTimes,
    ContestClock,
    call_times,
    contest_s,
    guessed_call_times,
    scaled_to,
)
from layerzero_tune.search.device import MeasuringDevice
from layerzero_tune.search.key_regret import KeyRegret

# Expected regret below which no point is added between those of the workload.
ENOUGH = 0.005
# A repeat comes after so many other contests, unless nothing else is left: at once it would meet the same layout of
# memory and the same drift of the machine.
APART = 100

# How contests rank that reach no bound; those that do go before.
ANY_OTHER = (1.0, 0.0, 0.0)

Kind = Literal["point", "edge", "probe", "repeat"]


@dataclass(frozen=True)
class Planned:
    """A contest that may come next.

    Attributes:
        kind: a "point" of the workload; a new point at an "edge", between different winners, or a "probe" between equal
            ones; a "repeat" of a contest that leaves a doubt.
        regret: expected regret at the point, log ratio.
        seconds: what it is expected to take.
    """

    kind: Kind
    contest: Contest
    regret: float
    seconds: float


@dataclass(frozen=True)
class Ranked:
    """`rank` orders ascending, over all keys; `not_before` is the number of contests after which it may come."""

    rank: tuple[float, ...]
    planned: Planned
    not_before: int

    @property
    def is_bound(self) -> bool:
        """Whether it comes before others because it reaches bounds."""
        return self.rank[: len(ANY_OTHER)] < ANY_OTHER

    def after_another(self) -> Ranked:
        """Ranked as it would be if one more contest of its key were measured."""
        is_later = (self.rank[0], self.rank[1] + 1.0, *self.rank[2:])
        return replace(self, rank=is_later) if self.is_bound else self

    def as_any_other(self) -> Ranked:
        """Ranked by what it is worth alone."""
        return replace(self, rank=(*ANY_OTHER, *self.rank[len(ANY_OTHER) :]))


class KeyAgenda:
    """What one static key has on the agenda.

    Args:
        device: offers repeats, and contests at added points.
        clock: what contests have taken so far, shared by all keys.
        operation: the key's operation.
        regret: the regret that is left under the key.
        waiting: contests of the workload that were not measured, by sizes.
        searched: what searches of configurations have given.
        refine: whether points are added between those of the workload, once these are measured.
    """

    def __init__(
        self,
        device: MeasuringDevice,
        clock: ContestClock,
        operation: Operation,
        regret: KeyRegret,
        waiting: Mapping[Sizes, Sequence[Contest]],
        searched: Searched,
        *,
        refine: bool,
    ) -> None:
        self.regret = regret
        self._device = device
        self._clock = clock
        self._operation = operation
        self._waiting = {sizes: deque(contests) for sizes, contests in waiting.items()}
        self._searched = searched
        self._refine = refine
        self._last: dict[Sizes, dict[SelectionContext, Contest]] = {}
        self._measured: dict[Sizes, tuple[SelectionContext, CallTimes]] = {}
        self._since: dict[Sizes, int] = {}
        self._between: tuple[tuple[Between, Contest], ...] = ()
        self._parted: RegretModel | None = None
        self._ranking: list[Ranked] | None = None

    @property
    def ranking(self) -> Sequence[Ranked]:
        """What may come next, best first."""
        if self._ranking is None:
            items = [*self._points(), *self._repeats(), *(self._added() if self._refine and not self._waiting else ())]
            self._ranking = sorted(items, key=lambda item: item.rank)
        return self._ranking

    def waiting(self) -> Iterable[Planned]:
        """The workload's contests that were not measured."""
        return (
            self._planned("point", sizes, contest) for sizes, contests in self._waiting.items() for contest in contests
        )

    def take_in(self, sizes: Sizes, rows: Sequence[Measurement], number: int = -APART) -> None:
        """The rows of a contest, the `number`-th of the run."""
        self.regret.learn(sizes, rows)
        self._measured[sizes] = (rows[0].context, call_times(rows))
        self._since[sizes] = number
        self._ranking = None

    def note_last(self, sizes: Sizes, contest: Contest) -> None:
        """The contest that a repeat of its point would follow."""
        self._last.setdefault(sizes, {})[contest.context] = contest
        self._ranking = None

    def strike(self, sizes: Sizes, contest: Contest) -> None:
        """Take a contest of the workload off the agenda."""
        waiting = self._waiting.get(sizes)
        if waiting and waiting[0].contest_id == contest.contest_id:
            waiting.popleft()
            if not waiting:
                del self._waiting[sizes]
        self._ranking = None

    def begin(self, sizes: Sizes) -> None:
        """A contest at these sizes is in flight."""
        self.regret.begin(sizes)
        self._ranking = None

    def expect(self, sizes: Sizes) -> None:
        """Count a contest as measured without knowing what it gave, and ask for no repeat there."""
        self._last.pop(sizes, None)
        self.regret.expect(sizes)
        self._ranking = None

    def renew(self) -> None:
        """Work out anew what is left."""
        self.regret.renew()
        self._ranking = None

    def _points(self) -> Iterable[Ranked]:
        count = len(self._measured)
        for sizes, contests in self._waiting.items():
            bounds = self.regret.new_bounds(sizes)
            coverage = (0.0, count, -bounds) if bounds else ANY_OTHER
            yield self._ranked(sizes, self._planned("point", sizes, contests[0]), coverage)

    def _repeats(self) -> Iterable[Ranked]:
        for sizes, contests in self._last.items():
            if sizes in self._waiting or not self.regret.leaves_doubt(sizes):
                continue
            again = next((found for last in contests.values() if (found := self._device.again(last))), None)
            if again is not None:
                not_before = self._since[sizes] + APART
                yield self._ranked(sizes, self._planned("repeat", sizes, again), not_before=not_before)

    def _added(self) -> Iterable[Ranked]:
        model = self.regret.model
        if model is not self._parted:
            self._parted = model
            self._between = tuple(self._doubtful_between(model)) if model else ()
        for point, contest in self._between:
            if point.sizes not in self._measured:
                yield self._ranked(
                    point.sizes, self._planned("edge" if point.is_edge else "probe", point.sizes, contest)
                )

    def _doubtful_between(self, model: RegretModel) -> Iterable[tuple[Between, Contest]]:
        for point in points_between(self._operation, model):
            contests = (
                self._device.contests(point.context, self._searched)
                if self.regret.regret(point.sizes) >= ENOUGH
                else ()
            )
            if contests:
                yield point, contests[0]

    def _planned(self, kind: Kind, sizes: Sizes, contest: Contest) -> Planned:
        seconds = contest_s(self._call_times(sizes, contest), contest.policy) * self._clock.correction
        return Planned(kind, contest, self.regret.regret(sizes), seconds)

    def _ranked(
        self,
        sizes: Sizes,
        planned: Planned,
        coverage: tuple[float, float, float] = ANY_OTHER,
        not_before: int = 0,
    ) -> Ranked:
        worth = round(self.regret.worth(sizes) / planned.seconds, 9)
        return Ranked((*coverage, -worth, *sizes), planned, not_before)

    def _call_times(self, sizes: Sizes, contest: Contest) -> CallTimes:
        near = self.regret.nearest_measured(sizes)
        if near is None or not self._measured[near][1].screened:
            return guessed_call_times(self._operation, contest.context, len(contest.candidates))
        return scaled_to(self._operation, contest.context, *self._measured[near])
