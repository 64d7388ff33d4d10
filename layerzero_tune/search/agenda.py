"""The agenda of a run: what may be measured next, and which of it lowers the regret most per second."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Operation, Sizes
from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.pipeline import Key
from layerzero_tune.measure.contest import Contest
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.search.between import points_between
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
from layerzero_tune.workload.lines import WorkloadLine

# Expected regret below which no point is added between those of the workload.
ENOUGH = 0.005
# A repeat comes after so many other contests, unless nothing else is left: at once it would meet the same layout of
# memory and the same drift of the machine.
APART = 100

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
class _Ranked:
    """`rank` orders ascending; `not_before` is the number of contests after which it may come."""

    rank: tuple[float, ...]
    planned: Planned
    not_before: int


@dataclass
class _KeyAgenda:
    """What one static key has on the agenda; `ranked` is None until it is worked out anew."""

    operation: Operation
    regret: KeyRegret
    waiting: dict[Sizes, deque[Contest]]
    last: dict[Sizes, dict[SelectionContext, Contest]] = field(default_factory=dict)
    near: dict[Sizes, tuple[SelectionContext, CallTimes]] = field(default_factory=dict)
    since: dict[Sizes, int] = field(default_factory=dict)
    ranked: list[_Ranked] | None = None


class Agenda:
    """The next contest, again and again, as results come in. Equal input gives equal choices.

    First every static key reaches the bounds of its points, the keys in turn, so that what is held compiles to a table
    that covers them. Then comes what lowers the weighted expected regret most per second. Not all is worked out anew
    after each contest, so that planning stays far below measuring.

    Args:
        device: offers the contests of points, and repeats.
        lines: the points and their weights.
        offered: the contests of each point; those that `held` has are done.
        held: rows of the results so far.
        refine: whether points are added between those of the workload.
    """

    def __init__(
        self,
        device: MeasuringDevice,
        lines: Iterable[WorkloadLine],
        offered: Mapping[SelectionContext, Sequence[Contest]],
        held: Mapping[str, Sequence[Measurement]],
        *,
        refine: bool,
    ) -> None:
        self._device = device
        self._refine = refine
        self._clock = ContestClock()
        self._measured = 0
        self._held = len(held)
        self._keys = _key_agendas(lines, offered, held)
        for rows in held.values():
            key, sizes = cell_of(rows[0].context)
            if key in self._keys:
                self._take_in(self._keys[key], sizes, rows)
        for contests in offered.values():
            for contest in contests:
                if contest.contest_id in held:
                    self._note_last(_latest(device, contest, held))
        for agenda in self._keys.values():
            agenda.regret.renew()

    def next(self, within_s: float = math.inf) -> Planned | None:
        """The most valuable contest that is expected to end within so many seconds; None if there is none."""
        for first_look in (True, False):
            found = [
                item
                for agenda in self._keys.values()
                if (item := self._first(agenda, within_s, apart=first_look)) is not None
            ]
            if found:
                return min(found, key=lambda item: item.rank).planned
            for agenda in self._keys.values():  # what the last contests said decides whether this is the end
                agenda.regret.renew()
                agenda.ranked = None
        return None

    def learn(self, planned: Planned, rows: Sequence[Measurement], taken_s: float | None = None) -> None:
        """Take in the rows of a contest, and how long it took where a clock was measured."""
        key, sizes = cell_of(planned.contest.context)
        agenda = self._keys[key]
        if taken_s is not None:
            self._clock.learn(planned.seconds / self._clock.correction, taken_s)
        self._measured += 1
        self._held += 1
        self._finish(agenda, sizes, planned.contest)
        self._take_in(agenda, sizes, rows)
        agenda.since[sizes] = self._measured
        self._note_last(planned.contest)
        if agenda.regret.is_due:
            agenda.regret.renew()

    def forecast(self, within_s: float = math.inf) -> tuple[Planned, ...]:
        """What a run of so many seconds would measure if each contest said what is expected of it. This agenda is used
        up by that."""
        found: list[Planned] = []
        while (planned := self.next(within_s)) is not None:
            key, sizes = cell_of(planned.contest.context)
            agenda = self._keys[key]
            found.append(planned)
            within_s -= planned.seconds
            self._finish(agenda, sizes, planned.contest)
            if planned.kind == "repeat":
                del agenda.last[sizes]
            agenda.regret.expect(sizes)
        return tuple(found)

    @property
    def held(self) -> int:
        """Contests that have been taken in, those of the results included."""
        return self._held

    @property
    def left(self) -> int:
        """Contests that are known to be to come, whatever their time."""
        return sum(len(self._ranking(agenda)) for agenda in self._keys.values())

    def waiting(self) -> tuple[Planned, ...]:
        """The workload's contests that were not measured, by key."""
        return tuple(
            self._planned("point", agenda, sizes, contest)
            for agenda in self._keys.values()
            for sizes, contests in agenda.waiting.items()
            for contest in contests
        )

    def expected_regret(self) -> tuple[float, float]:
        """The regret that is left at the workload's points: the weighted mean, and the largest."""
        for agenda in self._keys.values():
            agenda.regret.renew()
        sums = [agenda.regret.weighted for agenda in self._keys.values()]
        weight = math.fsum(weight for _, weight in sums)
        mean = math.fsum(regret for regret, _ in sums) / weight if weight else 0.0
        return mean, max((agenda.regret.worst() for agenda in self._keys.values()), default=0.0)

    def _first(self, agenda: _KeyAgenda, within_s: float, *, apart: bool) -> _Ranked | None:
        return next(
            (
                item
                for item in self._ranking(agenda)
                if item.planned.seconds <= within_s and not (apart and item.not_before > self._measured)
            ),
            None,
        )

    def _ranking(self, agenda: _KeyAgenda) -> list[_Ranked]:
        if agenda.ranked is None:
            items = [
                *self._points(agenda),
                *self._repeats(agenda),
                *(self._between(agenda) if self._refine and not agenda.waiting else ()),
            ]
            agenda.ranked = sorted(items, key=lambda item: item.rank)
        return agenda.ranked

    def _points(self, agenda: _KeyAgenda) -> Iterable[_Ranked]:
        count = len(agenda.near)
        for sizes, contests in agenda.waiting.items():
            planned = self._planned("point", agenda, sizes, contests[0])
            bounds = agenda.regret.new_bounds(sizes)
            coverage = (0.0, count, -bounds) if bounds else (1.0, 0.0, 0.0)
            yield self._ranked(agenda, sizes, planned, coverage)

    def _repeats(self, agenda: _KeyAgenda) -> Iterable[_Ranked]:
        for sizes, contests in agenda.last.items():
            if sizes in agenda.waiting or not agenda.regret.leaves_doubt(sizes):
                continue
            again = next((found for last in contests.values() if (found := self._device.again(last)) is not None), None)
            if again is not None:
                planned = self._planned("repeat", agenda, sizes, again)
                yield self._ranked(agenda, sizes, planned, not_before=agenda.since.get(sizes, -APART) + APART)

    def _between(self, agenda: _KeyAgenda) -> Iterable[_Ranked]:
        model = agenda.regret.model
        if model is None:
            return
        for point in points_between(agenda.operation, model):
            contests = self._device.contests(point.context) if point.sizes not in agenda.near else ()
            if contests and agenda.regret.regret(point.sizes) >= ENOUGH:
                planned = self._planned("edge" if point.is_edge else "probe", agenda, point.sizes, contests[0])
                yield self._ranked(agenda, point.sizes, planned)

    def _planned(self, kind: Kind, agenda: _KeyAgenda, sizes: Sizes, contest: Contest) -> Planned:
        seconds = contest_s(self._call_times(agenda, sizes, contest), contest.policy) * self._clock.correction
        return Planned(kind, contest, agenda.regret.regret(sizes), seconds)

    def _ranked(
        self,
        agenda: _KeyAgenda,
        sizes: Sizes,
        planned: Planned,
        coverage: tuple[float, float, float] = (1.0, 0.0, 0.0),
        not_before: int = 0,
    ) -> _Ranked:
        worth = round(agenda.regret.worth(sizes) / planned.seconds, 9)
        return _Ranked((*coverage, -worth, *sizes), planned, not_before)

    def _call_times(self, agenda: _KeyAgenda, sizes: Sizes, contest: Contest) -> CallTimes:
        near = agenda.regret.nearest_measured(sizes)
        if near is None or not agenda.near[near][1].screened:
            return guessed_call_times(agenda.operation, contest.context, len(contest.candidates))
        return scaled_to(agenda.operation, contest.context, *agenda.near[near])

    def _finish(self, agenda: _KeyAgenda, sizes: Sizes, contest: Contest) -> None:
        waiting = agenda.waiting.get(sizes)
        if waiting and waiting[0].contest_id == contest.contest_id:
            waiting.popleft()
            if not waiting:
                del agenda.waiting[sizes]
        agenda.ranked = None

    def _take_in(self, agenda: _KeyAgenda, sizes: Sizes, rows: Sequence[Measurement]) -> None:
        agenda.regret.learn(sizes, rows)
        agenda.near[sizes] = (rows[0].context, call_times(rows))
        agenda.ranked = None

    def _note_last(self, contest: Contest) -> None:
        key, sizes = cell_of(contest.context)
        self._keys[key].last.setdefault(sizes, {})[contest.context] = contest


def cell_of(context: SelectionContext) -> tuple[Key, Sizes]:
    """The static key and the sizes of a point."""
    operation = operation_named(context.operation)
    return (operation.name, operation.static_key(context)), operation.sizes(context)


def _latest(device: MeasuringDevice, contest: Contest, held: Collection[str]) -> Contest:
    """The last of the repeats of a stored contest that are stored, too."""
    while (again := device.again(contest)) is not None and again.contest_id in held:
        contest = again
    return contest


def _key_agendas(
    lines: Iterable[WorkloadLine],
    offered: Mapping[SelectionContext, Sequence[Contest]],
    held: Collection[str],
) -> dict[Key, _KeyAgenda]:
    """By key, in the order of the lines; points without any contest are no demand."""
    demand: dict[Key, dict[Sizes, float]] = {}
    examples: dict[Key, SelectionContext] = {}
    waiting: dict[Key, dict[Sizes, deque[Contest]]] = {}
    for line in lines:
        if not offered[line.context]:
            continue
        key, sizes = cell_of(line.context)
        examples.setdefault(key, line.context)
        weights = demand.setdefault(key, {})
        weights[sizes] = weights.get(sizes, 0.0) + line.weight
        missing = [contest for contest in offered[line.context] if contest.contest_id not in held]
        if missing:
            waiting.setdefault(key, {}).setdefault(sizes, deque()).extend(missing)
    agendas = {}
    for key, weights in demand.items():
        operation = operation_named(key[0])
        free = [operation.axes.index(axis) for axis in operation.axes_of(examples[key])]
        agendas[key] = _KeyAgenda(operation, KeyRegret(operation, free, weights), waiting.get(key, {}))
    return agendas
