"""The agenda of a run: what may be measured next, and which of it lowers the regret most per second."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain, islice

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Sizes
from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.cell import Key
from layerzero_tune.compile.pooling import neighbours, pooled_cell
from layerzero_tune.compile.waves import Waves
from layerzero_tune.measure.contest import Contest
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.search.configurations.searched import Searched
from layerzero_tune.search.contest_time import ContestClock
from layerzero_tune.search.device import MeasuringDevice
from layerzero_tune.search.key_agenda import KeyAgenda, Planned, Ranked
from layerzero_tune.search.key_regret import KeyRegret
from layerzero_tune.workload.lines import WorkloadLine

# Share of the time left that the keys may spend on reaching bounds before all else, each as much as any other. Over a
# recorded half hour of 1,925 contests with budgets of 2, 4 and 8 minutes the mean regret of two held-out fifths is 8.9,
# 5.6 and 3.2% with this share; 13.4, 6.1 and 3.0% without a limit; 9.9, 5.3 and 4.1% with a quarter.
BOUNDS_SHARE = 0.6


class Agenda:
    """The next contest, again and again, as results come in. Equal input gives equal choices.

    Static keys that share their verdicts count as one. First every key reaches the bounds of its points, the keys in
    turn, so that what is held compiles to a table that covers them. Then comes what lowers the weighted expected regret
    most per second. Not all is worked out anew after each contest, so that planning stays far below measuring.

    Args:
        device: offers repeats, and contests at added points.
        lines: the points and their weights.
        offered: the contests of each point; those that `held` has are done.
        held: rows of the results so far, by contest.
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
        self._platform = device.spec.platform
        self.done = set(held)
        self.searched = Searched((row for rows in held.values() for row in rows), self._platform)
        self._clock = ContestClock()
        self._measured = 0
        self._aside: set[str] = set()
        self._in_flight: set[str] = set()
        self._keys = _key_agendas(device, self._clock, lines, offered, held, self.searched, refine)
        for rows in held.values():
            key, sizes = self._cell_of(rows[0].context)
            if key in self._keys and not rows[0].is_search and (current := device.current(rows)):
                self._keys[key].take_in(sizes, current)
                if len(current) == len(rows) and (contest := device.recalled(rows)) is not None:
                    self._keys[key].note_last(sizes, contest)
        for agenda in self._keys.values():
            agenda.renew()

    def next(self, within_s: float = math.inf, *, beside_compilers: bool = False) -> Planned | None:
        """The most valuable contest that is expected to end within so many seconds; None if there is none.

        With `beside_compilers` of those alone that other processes do not disturb, and that ask for no more
        configurations; but before those that only rank `AFTERWARDS` come others, for which the compilers pause.
        """
        if beside_compilers:
            found = self._best_of_looks(within_s, _is_undisturbed)
            if found is not None and found.is_afterwards:
                other = self._best_of_looks(within_s, _is_no_search)
                found = other if other is not None and not other.is_afterwards else found
            return None if found is None else found.planned
        for first_look in (True, False):
            found = self._best(within_s, apart=first_look)
            if found is not None:
                return found.planned
            for agenda in self._keys.values():  # what the last contests said decides whether this is the end
                agenda.renew()
        return None

    def _best_of_looks(self, within_s: float, allowed: Callable[[Planned], bool]) -> Ranked | None:
        return self._best(within_s, allowed, apart=True) or self._best(within_s, allowed, apart=False)

    def _best(
        self, within_s: float, allowed: Callable[[Planned], bool] = lambda planned: True, *, apart: bool
    ) -> Ranked | None:
        firsts = (self._first(agenda, within_s, allowed, apart=apart) for agenda in self._keys.values())
        return min((item for item in firsts if item is not None), key=lambda item: item.rank, default=None)

    def coming(self, count: int) -> list[Planned]:
        """The contests that are likely to come after the next one: those that would if it said nothing new; fewer if
        there are fewer."""
        leading = [list(islice(agenda.ranking, count + 1)) for agenda in self._keys.values()]
        present = min((items for items in leading if items), key=lambda items: items[0].rank, default=[])
        following = [item.after_another() for item in present[1:]]
        following += chain.from_iterable(items for items in leading if items is not present)
        return [item.planned for item in sorted(following, key=lambda item: item.rank)[:count]]

    def begin(self, planned: Planned) -> None:
        """It is being measured: `next` leaves it out until it was learned, struck or set aside."""
        key, sizes = self._cell_of(planned.contest.context)
        self._in_flight.add(planned.contest.contest_id)
        self._keys[key].begin(sizes, planned)

    def learn(
        self,
        planned: Planned,
        rows: Sequence[Measurement],
        taken_s: float | None = None,
        preparation_s: float = 0.0,
        contest: Contest | None = None,
    ) -> None:
        """Take in the rows of a contest, and how long it took where a clock was measured, beside the loading and
        compiling of its kernels. `contest` is the one they are of where it is not the planned one, but one that a
        search has led to."""
        contest = contest or planned.contest
        key, sizes = self._cell_of(contest.context)
        agenda = self._keys[key]
        if taken_s is not None:
            self._learn_times(planned, agenda.is_begun, taken_s, preparation_s)
        self._measured += 1
        self.done.add(contest.contest_id)
        self.searched.add(rows)
        if planned.kind == "search":  # which goes on until it is struck
            return
        self._in_flight.discard(planned.contest.contest_id)
        agenda.strike(sizes, planned.contest)
        if contest.is_search:
            return
        agenda.take_in(sizes, rows, self._measured)
        agenda.note_last(sizes, contest)
        if agenda.regret.is_due:
            agenda.renew()

    def _learn_times(self, planned: Planned, is_begun: bool, taken_s: float, preparation_s: float) -> None:
        if planned.kind == "search":
            self._clock.learn_preparation("search", preparation_s)
            return
        self._clock.learn_preparation("later" if is_begun else "first", preparation_s)
        self._clock.learn((planned.seconds - planned.preparation_s) / self._clock.correction, taken_s)

    def strike(self, planned: Planned) -> None:
        """Take off what others have measured meanwhile, and a search that is over."""
        self._in_flight.discard(planned.contest.contest_id)
        key, sizes = self._cell_of(planned.contest.context)
        if planned.kind == "search":
            self._keys[key].end_search(sizes, planned)
        else:
            self._keys[key].strike(sizes, planned.contest)

    def set_aside(self, planned: Planned) -> None:
        """Leave to another run what that has begun, as long as there is something else."""
        self._in_flight.discard(planned.contest.contest_id)
        self._aside.add(planned.contest.contest_id)
        if planned.kind == "search":
            key, sizes = self._cell_of(planned.contest.context)
            self._keys[key].end_search(sizes, planned)

    def bring_back(self) -> int:
        """Have all that was set aside on the agenda again; how much that is."""
        count = len(self._aside)
        self._aside.clear()
        return count

    def forecast(self, within_s: float = math.inf) -> tuple[Planned, ...]:
        """What a run of so many seconds would measure if each contest said what is expected of it. This agenda is used
        up by that."""
        found: list[Planned] = []
        while (planned := self.next(within_s)) is not None:
            key, sizes = self._cell_of(planned.contest.context)
            found.append(planned)
            within_s -= planned.seconds
            if planned.kind == "search":
                self._keys[key].begin(sizes, planned)
            else:
                self._keys[key].strike(sizes, planned.contest)
                self._keys[key].expect(sizes)
        return tuple(found)

    @property
    def held(self) -> int:
        """Contests that have been taken in, those of the results included."""
        return len(self.done)

    @property
    def left(self) -> int:
        """Contests that are known to be to come, whatever their time."""
        return sum(len(agenda.ranking) for agenda in self._keys.values())

    def waiting(self) -> tuple[Planned, ...]:
        """The workload's contests that were not measured, by key."""
        return tuple(planned for agenda in self._keys.values() for planned in agenda.waiting())

    def expected_regret(self) -> tuple[float, float]:
        """The regret that is left at the workload's points: the weighted mean, and the largest."""
        for agenda in self._keys.values():
            agenda.renew()
        sums = [agenda.regret.weighted for agenda in self._keys.values()]
        weight = math.fsum(weight for _, weight in sums)
        mean = math.fsum(regret for regret, _ in sums) / weight if weight else 0.0
        return mean, max((agenda.regret.worst() for agenda in self._keys.values()), default=0.0)

    def _cell_of(self, context: SelectionContext) -> tuple[Key, Sizes]:
        return pooled_cell(context, self._platform)

    def _first(
        self, agenda: KeyAgenda, within_s: float, allowed: Callable[[Planned], bool], *, apart: bool
    ) -> Ranked | None:
        """The best of a key that may come now. Bounds that would take more than their key's share of the time do not go
        first: they wait their turn by what they are worth."""
        share_s = BOUNDS_SHARE * within_s / len(self._keys)
        dear: list[Ranked] = []
        for item in agenda.ranking:
            contest_id = item.planned.contest.contest_id
            if contest_id in self._aside or contest_id in self._in_flight:
                continue
            if not allowed(item.planned):
                continue
            if item.planned.seconds > within_s or (apart and item.not_before > self._measured):
                continue
            if item.is_bound and item.planned.seconds > share_s:
                dear.append(item.as_any_other())
                continue
            dear.append(item)
            break
        return min(dear, key=lambda item: item.rank, default=None)


def _is_no_search(planned: Planned) -> bool:
    return planned.kind != "search"


def _is_undisturbed(planned: Planned) -> bool:
    """Whether its times are the same beside busy processes: in a CUDA graph the host takes no part."""
    return _is_no_search(planned) and planned.contest.context.mode == "graph"


def _key_agendas(
    device: MeasuringDevice,
    clock: ContestClock,
    lines: Iterable[WorkloadLine],
    offered: Mapping[SelectionContext, Sequence[Contest]],
    held: Collection[str],
    searched: Searched,
    refine: bool,
) -> dict[Key, KeyAgenda]:
    """By key, in the order of the lines; points without any contest are no demand."""
    demand: dict[Key, dict[Sizes, float]] = {}
    examples: dict[Key, SelectionContext] = {}
    waiting: dict[Key, dict[Sizes, list[Contest]]] = {}
    for line in lines:
        if not offered[line.context]:
            continue
        key, sizes = pooled_cell(line.context, device.spec.platform)
        examples.setdefault(key, line.context)
        weights = demand.setdefault(key, {})
        weights[sizes] = weights.get(sizes, 0.0) + line.weight
        missing = [contest for contest in offered[line.context] if contest.contest_id not in held]
        if missing:
            waiting.setdefault(key, {}).setdefault(sizes, []).extend(missing)
    agendas = {}
    for key, weights in demand.items():
        operation = operation_named(key[0])
        free = [operation.axes.index(axis) for axis in operation.axes_of(examples[key])]
        regret = KeyRegret(operation, free, weights, Waves.of(operation, device.spec))
        agendas[key] = KeyAgenda(device, clock, operation, regret, waiting.get(key, {}), searched, refine=refine)
    for key, found in neighbours(agendas, device.spec.platform).items():
        agendas[key].regret.heed((octaves, agendas[other].regret) for octaves, other in found)
    return agendas
