"""Where regret is left under one static key, as its contests come in, and what a measurement there is worth."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from layerzero_runtime.operation import Operation, Sizes
from layerzero_tune.compile.arrays import Floats, Mask
from layerzero_tune.compile.coverage import bounds_of
from layerzero_tune.compile.distrust import disturbed_contests
from layerzero_tune.compile.estimate import Estimate, largest_loss
from layerzero_tune.compile.judge import Choice, Verdict, judge
from layerzero_tune.compile.pooling import told_of
from layerzero_tune.compile.regret import RegretModel, place_of, reach_over, vouching
from layerzero_tune.compile.waves import Waves
from layerzero_tune.compile.witnesses import witnesses
from layerzero_tune.identity import choice_of
from layerzero_tune.measure.statistics import LOG_RESOLUTION
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.search.demand_bounds import DemandBounds
from layerzero_tune.search.doubt import close_choices, leaves_doubt

# Log ratio that a call of the default is taken to lose where nothing is known: on an H100 it takes 1.28 times the time
# of the best over 798 shapes (EVIDENCE 1).
UNKNOWN = math.log(1.28)
# Standard deviation of a log ratio from one contest, by memory layout and slow drift, which its rounds do not show. Of
# 1,190 points of two tunings of one CPU the ratios of the best two kernels differ by 2.5% (median by gap) between the
# tunings, that is 1.8% each.
CONTEST_DEVIATION = 0.018
# The same of a disturbed contest: on a Xeon their ratios moved by 2.9%, those of others by 1.6%.
DISTURBED_DEVIATION = 1.8 * CONTEST_DEVIATION
# The regret is worked out again when a sixteenth of the key's contests is new: so many contests cost at most 16 times
# what one working out costs. Until then each new contest takes its share from the regret around it.
_RENEWED_PER = 16


class KeyRegret:
    """The regret that is left at the demanded sizes of one static key.

    Args:
        operation: the key's operation.
        free: the axes that distances are measured on.
        demand: weight of each of the sizes that are asked for.
        waves: of the operation's calls on the device.
    """

    def __init__(
        self, operation: Operation, free: Sequence[int], demand: Mapping[Sizes, float], waves: Waves | None = None
    ) -> None:
        self.operation = operation
        self._waves = waves
        self.free = tuple(free)
        self.demand = dict(sorted(demand.items()))
        self._index = {sizes: number for number, sizes in enumerate(self.demand)}
        self._places = self._placed(self.demand)
        self._weights = np.array(list(self.demand.values()))
        self._rows: dict[Sizes, list[Measurement]] = {}
        self._verdicts: dict[Sizes, Verdict | None] = {}
        self._doubts: dict[Sizes, bool] = {}
        self._settled: set[Sizes] = set()
        self._begun: set[Sizes] = set()
        self._new: set[Sizes] = set()
        self._unjudged: set[Sizes] = set()
        self._contests = 0
        self._neighbours: tuple[tuple[float, KeyRegret], ...] = ()
        self._heard: tuple[int, ...] = ()
        self._bounds = DemandBounds(self.demand, self.free)
        self._model: RegretModel | None = None
        self._regrets = np.full(len(self.demand), UNKNOWN)
        self._is_covered = np.zeros(len(self.demand), dtype=np.bool_)
        self._worths: Floats | None = None
        self._gains: dict[tuple[Sizes, frozenset[Choice]], float] = {}
        self._nearest: list[Sizes | None] = [None] * len(self.demand)
        self._beside = np.zeros(len(self.demand))
        self._nearest_distances = np.full(len(self.demand), math.inf)

    def heed(self, neighbours: Iterable[tuple[float, KeyRegret]]) -> None:
        """From now on, whenever the regret is worked out, count what keys so many octaves away tell of this one
        (`pooling.neighbours`)."""
        self._neighbours = tuple(neighbours)

    @property
    def model(self) -> RegretModel | None:
        """The regret model of what was measured, None before anything has a time; it may lag by a few contests."""
        return self._model

    @property
    def contests(self) -> int:
        """How many have come in."""
        return self._contests

    @property
    def measured(self) -> Collection[Sizes]:
        """The sizes with a contest, whether or not it gave a time."""
        return self._rows.keys()

    def learn(self, sizes: Sizes, rows: Sequence[Measurement]) -> None:
        """Take in a contest; until `renew` works out what it says, it counts as was expected of it. One of a type that
        shares its verdicts with what is held at these sizes is a further one of the same cell."""
        if sizes not in self._rows and sizes not in self._index:
            self._beside[self._nearest_demanded(sizes)] += 1.0
        held = self._rows.setdefault(sizes, [])
        if held and held[0].context.dtype != rows[0].context.dtype:
            rows = [replace(row, context=held[0].context) for row in rows]
        held.extend(rows)
        self._contests += 1
        self._new.add(sizes)
        self._unjudged.add(sizes)
        self._doubts.pop(sizes, None)
        distances = self._distances(sizes)
        for closer in np.flatnonzero(distances < self._nearest_distances).tolist():
            self._nearest[closer] = sizes
        self._nearest_distances = np.minimum(self._nearest_distances, distances)
        if sizes in self._begun:
            self._begun.discard(sizes)
        else:
            self.expect(sizes)

    def begin(self, sizes: Sizes) -> None:
        """Expect a contest that is in flight, so that what is chosen beside it lies elsewhere."""
        if sizes not in self._begun:
            self._begun.add(sizes)
            self.expect(sizes)

    def expect(self, sizes: Sizes) -> None:
        """Count a contest as measured, with its share taken off the regret around it."""
        self._settled.add(sizes)
        self._bounds.reach(sizes)
        self._worths = None
        self._regrets = self._regrets * (1.0 - self._shares(sizes))

    @property
    def is_due(self) -> bool:
        """Whether so much is new that the regret should be worked out again."""
        return len(self._new) * _RENEWED_PER >= len(self._rows)

    def renew(self) -> None:
        """Work the regret out from all that was measured, where contests have come in since, here or beside."""
        heard = tuple(neighbour.contests for _, neighbour in self._neighbours)
        if not self._new and heard == self._heard:
            return
        verdicts = self.verdicts
        told = told_of(verdicts, [(octaves, neighbour.verdicts) for octaves, neighbour in self._neighbours])
        before, self._model = self._model, RegretModel(verdicts, self.free, told, self._waves) if verdicts else None
        covered = self._covered()
        stale = self._near_new() | (covered != self._is_covered)
        if before is None or self._model is None or before.reference != self._model.reference or heard != self._heard:
            stale[:] = True
        self._heard = heard
        self._is_covered = covered
        for sizes, number in self._index.items():
            if stale[number]:
                self._regrets[number] = self._regret(sizes, bool(covered[number]))
        self._new.clear()
        self._worths = None
        self._gains.clear()

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """What all contests say that have come in, in ascending order of sizes."""
        for sizes in self._unjudged:
            if not all(row.is_slowed for row in self._rows[sizes]):  # else it says nothing
                found = next(iter(judge(self._rows[sizes]).values()), (None,))
                self._verdicts[sizes] = found[0]
        self._unjudged.clear()
        return tuple(verdict for _, verdict in sorted(self._verdicts.items()) if verdict is not None)

    def _near_new(self) -> Mask:
        """The demanded sizes of which the model says something else because of the new contests."""
        reach = 2.0 * np.maximum(reach_over(self.free), self._nearest_distances)
        near = np.zeros(len(self.demand), dtype=np.bool_)
        for sizes in self._new:
            near |= self._distances(sizes) <= reach
        return near

    def regret(self, sizes: Sizes) -> float:
        """Expected log(time of what a table would serve here / time of the best)."""
        if sizes in self._index:
            return float(self._regrets[self._index[sizes]])
        return self._regret(sizes, is_covered=True)

    @property
    def weighted(self) -> tuple[float, float]:
        """The weighted sum of the regrets at the demanded sizes, and the sum of the weights."""
        return float(self._weights @ self._regrets), float(self._weights.sum())

    def worst(self) -> float:
        """The largest regret at demanded sizes."""
        return float(self._regrets.max(initial=0.0))

    def worth(self, sizes: Sizes) -> float:
        """The expected fall of the weighted regret by a contest at these sizes: at them and, as far as the model
        reaches, around; for sizes that have one already, as the deviation of a mean of contests falls."""
        if sizes in self._rows:
            contests = len({row.contest_id for row in self._rows[sizes]})
            return self.demanded(sizes) * self.regret(sizes) * (1.0 - math.sqrt(contests / (contests + 1)))
        if sizes in self._index:
            return float(self._all_worths[self._index[sizes]])
        return self.demanded(sizes) * self.regret(sizes)

    def nearest_measured(self, sizes: Sizes) -> Sizes | None:
        """The nearest sizes with a contest, None before the first."""
        if sizes in self._index:
            return self._nearest[self._index[sizes]]
        place = place_of(sizes, self.free)
        return min(self._rows, key=lambda other: (math.dist(place_of(other, self.free), place), other), default=None)

    def leaves_doubt(self, sizes: Sizes) -> bool:
        """Whether another contest at these measured sizes may settle something."""
        if sizes not in self._doubts:
            self._doubts[sizes] = leaves_doubt(self._rows[sizes])
        return self._doubts[sizes]

    def served(self, sizes: Sizes) -> Choice | None:
        """What an entry would give at measured sizes; None without a time. It may lag by a few contests."""
        verdict = self._verdicts.get(sizes)
        return None if verdict is None else verdict.served

    def behind(self, sizes: Sizes, kernel_id: str) -> Mapping[Choice, float]:
        """For each choice of the kernel with a time at measured sizes, log(its time / time of what an entry would
        give)."""
        verdict = self._verdicts.get(sizes)
        if verdict is None:
            return {}
        lead = verdict.log_ratio(verdict.served)
        standings = verdict.standings.items()
        return {choice: standing.log_ratio - lead for choice, standing in standings if choice[0] == kernel_id}

    def gain_of(self, entrants: frozenset[Choice], sizes: Sizes) -> float:
        """What is served at measured sizes may lose to choices that were not measured there: the largest expected log
        ratio, by what they were elsewhere. It may lag by a few contests."""
        if (sizes, entrants) not in self._gains:
            self._gains[sizes, entrants] = self._gain_of(entrants, sizes)
        return self._gains[sizes, entrants]

    def _gain_of(self, entrants: Collection[Choice], sizes: Sizes) -> float:
        served = self.served(sizes)
        if served is None or self._model is None:
            return UNKNOWN
        found = self._model.estimates({served, *entrants}, sizes)
        if found.keys() < {served, *entrants}:
            return UNKNOWN
        return largest_loss(found[served], (found[choice] for choice in entrants))

    def tried(self, sizes: Sizes) -> frozenset[Choice]:
        """The choices that were measured at these sizes, with or without a time."""
        rows = self._rows.get(sizes, ())
        return frozenset(choice_of(row.kernel_id, row.configuration) for row in rows)

    @cached_property
    def octaves(self) -> Floats:
        """How far the demanded sizes, in their order, are from each other: (sizes, sizes)."""
        return np.stack([self._distances(sizes) for sizes in self.demand])

    def in_doubt(self, sizes: Sizes) -> frozenset[Choice]:
        """The choices at measured sizes of which another contest may tell which is best; none without a time."""
        verdict = self._verdicts.get(sizes)
        return frozenset() if verdict is None else close_choices(verdict)

    def new_bounds(self, sizes: Sizes) -> int:
        """How many bounds of the demand a contest here would be the first to reach."""
        return self._bounds.new_at(sizes)

    def _regret(self, sizes: Sizes, is_covered: bool) -> float:
        if sizes in self._verdicts:
            verdict = self._verdicts[sizes]
            return 0.0 if verdict is None else self._verdict_regret(verdict)
        if self._model is None:
            return UNKNOWN
        found = self._model.estimates(self._model.choices, sizes)
        default = self._model.verdicts[0].default
        served = min(found, key=lambda choice: (found[choice].log_ratio, choice)) if is_covered else default
        if served not in found:
            return UNKNOWN
        return largest_loss(found[served], (other for choice, other in found.items() if choice != served))

    def _verdict_regret(self, verdict: Verdict) -> float:
        """What the choice that an entry may give here loses to any other, beside what other contests may say."""
        rows = self._rows[verdict.sizes]
        trusted = len({row.contest_id for row in rows if row.status == "ok"} - disturbed_contests(rows))
        deviation = CONTEST_DEVIATION / math.sqrt(trusted) if trusted else DISTURBED_DEVIATION
        served = verdict.served
        own = Estimate(verdict.log_ratio(served), 0.0, deviation)
        if not math.isfinite(own.log_ratio):
            return UNKNOWN
        others = (
            Estimate(standing.log_ratio, 0.0, 0.0)
            for choice, standing in verdict.standings.items()
            if choice != served and standing.rounds
        )
        return largest_loss(own, others)

    def _covered(self) -> Mask:
        """Which demanded sizes the measured range holds and a measured cell vouches for."""
        if self._model is None:
            return np.zeros(len(self.demand), dtype=np.bool_)
        bounds = bounds_of([verdict.sizes for verdict in self._model.verdicts])
        places = self._placed(verdict.sizes for verdict in witnesses(self._model, bounds))
        low, high = (np.array(place_of(corner, self.free)) for corner in zip(*bounds, strict=True))
        product = places.sum(axis=1).max()
        slack = LOG_RESOLUTION
        inside = ((self._places >= low - slack) & (self._places <= high + slack)).all(axis=1)
        inside &= self._places.sum(axis=1) <= product + slack
        vouched: Mask = np.array([vouching(places, place).any() for place in self._places])
        covered: Mask = inside & vouched
        return covered

    @property
    def _all_worths(self) -> Floats:
        if self._worths is None:
            left = self._weights * self._regrets
            left[[number for sizes, number in self._index.items() if sizes in self._settled]] = 0.0
            self._worths = self._reaches @ (left * self._is_covered) + self._vouching @ (left * ~self._is_covered)
        return self._worths

    @cached_property
    def _reaches(self) -> Floats:
        """How much a contest at one of the demanded sizes says of each other: falls linearly with the distance, as the
        weights of the regret model do."""
        reaches: Floats = np.maximum(0.0, 1.0 - self.octaves / reach_over(self.free))
        return reaches

    @cached_property
    def _vouching(self) -> Floats:
        """The same of sizes at which a table misses now: it serves all for which a contest vouches."""
        vouched = np.stack([vouching(self._places, place) for place in self._places])
        return np.maximum(self._reaches, vouched)

    def _shares(self, sizes: Sizes) -> Floats:
        shares: Floats = np.maximum(0.0, 1.0 - self._distances(sizes) / reach_over(self.free))
        return shares

    def _distances(self, sizes: Sizes) -> Floats:
        """From the demanded sizes, in octaves."""
        offsets = self._places - np.array(place_of(sizes, self.free))
        distances: Floats = np.sqrt((offsets * offsets).sum(axis=1))
        return distances

    def demanded(self, sizes: Sizes) -> float:
        """The weight of these sizes; between the demanded ones, what each of those measured beside the nearest has of
        its weight: a demanded point stands for the calls around it, however many of these are measured."""
        if sizes in self.demand:
            return self.demand[sizes]
        nearest = self._nearest_demanded(sizes)
        return float(self._weights[nearest] / (1.0 + self._beside[nearest]))

    def _nearest_demanded(self, sizes: Sizes) -> int:
        return int(self._distances(sizes).argmin())

    def _placed(self, cells: Iterable[Sizes]) -> Floats:
        return np.array([place_of(sizes, self.free) for sizes in cells], dtype=np.float64)
