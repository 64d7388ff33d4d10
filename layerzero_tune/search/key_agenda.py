"""The agenda of one static key, or of those that share their verdicts: what may be measured next under it, ranked."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Operation, Sizes
from layerzero_tune.compile.judge import Choice
from layerzero_tune.identity import choice_of
from layerzero_tune.measure.contest import Contest
from layerzero_tune.results.measurement import Measurement
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
from layerzero_tune.search.key_between import ENOUGH, PointsBetween
from layerzero_tune.search.key_regret import KeyRegret
from layerzero_tune.search.key_searches import KeySearches

# A repeat comes after so many other contests, unless nothing else is left: at once it would meet the same layout of
# memory and the same drift of the machine.
APART = 100

# How contests rank that reach no bound; those that do go before. What the workload does not ask for comes after, and
# with it what hardly lowers its regret: of these what is worth most per second.
ANY_OTHER = (1.0, 0.0, 0.0)
AFTERWARDS = (2.0, 0.0, 0.0)

Kind = Literal["point", "edge", "probe", "repeat", "search", "entry"]


@dataclass(frozen=True)
class Planned:
    """A contest that may come next.

    Attributes:
        kind: a "point" of the workload; a new point at an "edge", between different winners, or a "probe" between equal
            ones; a "repeat" of a contest that leaves a doubt; a "search" of a kernel's configurations, which is the
            first of its contests; the "entry" of configurations that searches have found.
        regret: expected regret at the point, log ratio; of configurations, their expected gain there.
        seconds: what it is expected to take, a search with all of its contests.
        preparation_s: how much of that goes to loading and compiling kernels.
    """

    kind: Kind
    contest: Contest
    regret: float
    seconds: float
    preparation_s: float = 0.0


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

    @property
    def is_afterwards(self) -> bool:
        """Whether it only comes after what the workload asks for."""
        return self.rank[: len(AFTERWARDS)] >= AFTERWARDS

    def after_another(self) -> Ranked:
        """Ranked as it would be if one more contest of its key were measured."""
        is_later = (self.rank[0], self.rank[1] + 1.0, *self.rank[2:])
        return replace(self, rank=is_later) if self.is_bound else self

    def as_any_other(self) -> Ranked:
        """Ranked by what it is worth alone."""
        return replace(self, rank=(*ANY_OTHER, *self.rank[len(ANY_OTHER) :]))


class KeyAgenda:
    """What one static key has on the agenda, with those that share its verdicts.

    Args:
        device: offers repeats, and contests at added points.
        clock: what contests have taken so far, shared by all keys.
        operation: the key's operation.
        regret: the regret that is left under the key.
        waiting: contests of the workload that were not measured, by sizes.
        searched: what searches of configurations have given, under all keys.
        refine: whether points are added between those of the workload, once these hardly lower the regret.
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
        self._refine = refine
        self._searches = None if device.searches is None else KeySearches(device.searches, regret, searched)
        if self._searches is not None:
            for sizes, contests in waiting.items():
                self._searches.add(sizes, contests[0].context)
        self._last: dict[Sizes, dict[frozenset[str], Contest]] = {}
        self._measured: dict[Sizes, tuple[SelectionContext, CallTimes]] = {}
        self._dtypes: set[str] = set()
        self._since: dict[Sizes, int] = {}
        self._expected: set[Sizes] = set()
        self._between = PointsBetween(device, operation, regret, self._call_times)
        self._ranking: list[Ranked] | None = None

    @property
    def ranking(self) -> Sequence[Ranked]:
        """What may come next, best first."""
        if self._ranking is None:
            searches = dict(self._searching())
            points = list(self._points(searches))
            items = [*points, *self._repeats(), *self._entries()]
            items += [found for sizes, found in searches.items() if sizes not in self._waiting]
            if self._refine and all(point.is_afterwards for point in points):
                items += self._added()
            self._ranking = sorted(items, key=lambda item: item.rank)
        return self._ranking

    @property
    def is_begun(self) -> bool:
        """Whether anything was measured under the key."""
        return bool(self._measured)

    def waiting(self) -> Iterable[Planned]:
        """The workload's contests that were not measured."""
        return (
            self._planned("point", sizes, contest) for sizes, contests in self._waiting.items() for contest in contests
        )

    def take_in(self, sizes: Sizes, rows: Sequence[Measurement], number: int = -APART) -> None:
        """The rows of a contest, the `number`-th of the run."""
        self.regret.learn(sizes, rows)
        self._dtypes.add(rows[0].context.dtype)
        self._measured[sizes] = (rows[0].context, call_times(rows))
        self._since[sizes] = number
        if self._searches is not None:
            self._searches.add(sizes, rows[0].context)
        self._ranking = None

    def note_last(self, sizes: Sizes, contest: Contest) -> None:
        """A contest that a repeat would follow, unless a later repeat of it is known."""
        last = self._last.setdefault(sizes, {})
        jobs = frozenset(contest.job_ids)
        if jobs not in last or last[jobs].repeat < contest.repeat:
            last[jobs] = contest
        self._ranking = None

    def strike(self, sizes: Sizes, contest: Contest) -> None:
        """Take a contest of the workload off the agenda."""
        waiting = self._waiting.get(sizes)
        if waiting and waiting[0].contest_id == contest.contest_id:
            waiting.popleft()
            if not waiting:
                del self._waiting[sizes]
        self._ranking = None

    def begin(self, sizes: Sizes, planned: Planned) -> None:
        """It is in flight."""
        if planned.kind == "search" and self._searches is not None:
            self._searches.begin(searched_kernel(planned), sizes)
        else:
            self.regret.begin(sizes)
        self._ranking = None

    def end_search(self, sizes: Sizes, planned: Planned) -> None:
        """A search is over, or left to another run."""
        assert self._searches is not None
        self._searches.end(searched_kernel(planned), sizes)
        self._ranking = None

    def expect(self, sizes: Sizes) -> None:
        """Count a contest as measured without knowing what it gave, and ask for no repeat and no entry there."""
        self._expected.add(sizes)
        self._last.pop(sizes, None)
        self.regret.expect(sizes)
        if self._searches is not None:
            self._searches.expect(sizes)
        self._ranking = None

    def renew(self) -> None:
        """Work out anew what is left."""
        self.regret.renew()
        self._ranking = None

    def _points(self, searches: Mapping[Sizes, Ranked]) -> Iterable[Ranked]:
        """The workload's points; one that a search waits for ranks as the search does, one at which kernels enter that
        came later, or changed, by what they may gain there."""
        count = len(self._measured)
        for sizes, contests in self._waiting.items():
            bounds = self.regret.new_bounds(sizes)
            # A type has to be measured at all before the other one's verdicts say anything of it.
            is_new_type = contests[0].context.dtype not in self._dtypes
            planned = self._planned("point", sizes, contests[0])
            coverage = _asked(planned.regret)
            if bounds or is_new_type:
                coverage = (0.0, count, -bounds)
            found = self._ranked(sizes, planned, coverage)
            if sizes in self._measured and (entrants := _choices(contests[0]) - self.regret.tried(sizes)):
                found = self._entering(found, sizes, entrants)
            yield replace(found, rank=min(found.rank, searches[sizes].rank)) if sizes in searches else found

    def _entering(self, found: Ranked, sizes: Sizes, entrants: frozenset[Choice]) -> Ranked:
        gain = self.regret.gain_of(entrants, sizes)
        if gain <= found.planned.regret:
            return found
        planned = replace(found.planned, regret=gain)
        return Ranked(_rank(gain * self.regret.demanded(sizes), planned, sizes), planned, found.not_before)

    def _repeats(self) -> Iterable[Ranked]:
        for sizes, contests in self._last.items():
            if sizes in self._waiting or not self.regret.leaves_doubt(sizes):
                continue
            in_doubt = self.regret.in_doubt(sizes)
            held = [(len(in_doubt & _choices(contest)), contest) for contest in contests.values()]
            most = max(count for count, _ in held)
            telling = (contest for count, contest in held if count == most)
            again = next((found for last in telling if (found := self._device.again(last))), None)
            if again is not None:
                planned = self._planned("repeat", sizes, again)
                yield self._ranked(sizes, planned, _asked(planned.regret), self._since[sizes] + APART)

    def _added(self) -> Iterable[Ranked]:
        for added in self._between.found():
            if added.sizes not in self._measured and added.sizes not in self._expected:
                planned = self._timed("edge" if added.is_edge else "probe", added.contest, added.regret, added.times)
                worth = self.regret.demanded(added.sizes) * added.regret
                yield Ranked(_rank(worth, planned, added.sizes, AFTERWARDS), planned, 0)

    def _searching(self) -> Iterable[tuple[Sizes, Ranked]]:
        """The searches of configurations that are worth most."""
        for found in () if self._searches is None else self._searches.searches():
            contest, left = found.step.contest, found.step.left
            preparation_s = left * self._clock.preparation_s("search")
            timing_s = left * contest_s(self._call_times(found.sizes, contest), contest.policy) * self._clock.correction
            planned = Planned("search", contest, found.gain, timing_s + preparation_s, preparation_s)
            yield found.sizes, Ranked(_rank(found.worth, planned, found.sizes), planned, 0)

    def _entries(self) -> Iterable[Ranked]:
        """What searches have found, where it was not measured yet."""
        for found in () if self._searches is None else self._searches.entries():
            planned = replace(self._planned("entry", found.sizes, found.contest), regret=found.gain)
            worth = found.gain * self.regret.demanded(found.sizes)
            yield Ranked(_rank(worth, planned, found.sizes), planned, 0)

    def _planned(self, kind: Kind, sizes: Sizes, contest: Contest) -> Planned:
        return self._timed(kind, contest, self.regret.regret(sizes), self._call_times(sizes, contest))

    def _timed(self, kind: Kind, contest: Contest, regret: float, times: CallTimes) -> Planned:
        seconds = contest_s(times, contest.policy) * self._clock.correction
        preparation_s = self._clock.preparation_s("later" if self._measured else "first")
        return Planned(kind, contest, regret, seconds + preparation_s, preparation_s)

    def _ranked(
        self,
        sizes: Sizes,
        planned: Planned,
        coverage: tuple[float, float, float] = ANY_OTHER,
        not_before: int = 0,
    ) -> Ranked:
        return Ranked(_rank(self.regret.worth(sizes), planned, sizes, coverage), planned, not_before)

    def _call_times(self, sizes: Sizes, contest: Contest) -> CallTimes:
        near = self.regret.nearest_measured(sizes)
        if near is None or not self._measured[near][1].screened:
            return guessed_call_times(
                self._operation, contest.context, len(contest.candidates), self._device.spec.platform
            )
        return scaled_to(self._operation, contest.context, *self._measured[near])


def searched_kernel(planned: Planned) -> str:
    """The kernel whose configurations a planned search looks for."""
    return planned.contest.candidates[0].kernel_id


def _rank(
    worth: float, planned: Planned, sizes: Sizes, coverage: tuple[float, float, float] = ANY_OTHER
) -> tuple[float, ...]:
    return (*coverage, -round(worth / planned.seconds, 9), *sizes)


def _asked(regret: float) -> tuple[float, float, float]:
    """How a contest at a point of the workload ranks by its expected regret, where it reaches no bound."""
    return ANY_OTHER if regret >= ENOUGH else AFTERWARDS


def _choices(contest: Contest) -> frozenset[Choice]:
    return frozenset(choice_of(found.kernel_id, found.configuration) for found in contest.candidates)
