"""The regret model: what each choice is expected to cost at any sizes of one static key, and how sure that is.

One model serves the compiler (which gains hold between the measured sizes, where a table must miss), the tuner (what to
measure next) and the agreement of two tables (which plans a table takes for as good as its own). Kernels' times jump
with whether a length is even or fills whole tiles, so nothing global is fitted: only the cells nearby speak.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.arrays import Floats, Mask, Rows
from layerzero_tune.compile.estimate import Estimate, Estimates, largest_loss
from layerzero_tune.compile.judge import Choice, Standing, Verdict
from layerzero_tune.compile.local_plane import local_planes, sum_of, total
from layerzero_tune.compile.untried import with_untried
from layerzero_tune.compile.waves import Waves
from layerzero_tune.measure.statistics import LOG_RESOLUTION

# A cell speaks for sizes up to this factor away, with a weight that falls linearly in log distance (over several axes
# the Euclidean one). Of the reaches and kernels tried on the committed results (5,789 cells predicted without
# themselves), a plane over this one has the smallest root mean square error of the log ratio: 0.153. The weighted mean
# without slopes 0.178 at best, the nearest cell 0.245, kriging with a nugget 0.156.
REACH = 2.0**1.5
# Variance of the offsets (in squared octaves, at a total weight of 1 cell) that the slopes of the plane must beat.
_RIDGE = 0.1
# Where cells lie dense, the reach ends at this multiple of the distance to the n-th nearest: kernels' times jump from
# one length to the next, of which far cells know less than those beside (nearest-neighbour bandwidth; Cleveland 1979).
# Judged by cells left out of 6,698 contests of an H100 and by an evaluation's contests, the loss of what is expected to
# be fastest at full attention falls from 0.021 to 0.017 and from 0.032 to 0.017; 8 and 24 neighbours are worse.
_NEIGHBOURS = 14
_BEYOND = 1.3
# Where all cells are further away, the reach is this multiple of the nearest one's distance.
_WIDENING = 1.5
# How many octaves of a size an octave of idleness in the last wave counts. Judged as the neighbours are, what is
# expected to be fastest loses 0.0092, 0.0094 and 0.0097 with 1, 2 and 3, and by the evaluation 0.0047, 0.0028, 0.0035.
_WAVE = 2.0
# How many downside deviations of the surroundings a mean gain must exceed to hold between the cells. On a Xeon with 2
# cores, judged by 400 shapes outside the results: without this condition the table was slower than the default at 4.
DEVIATIONS = 0.5
# A cell vouches for sizes within this factor on every axis: half of the widest step (16x) between neighbours of a grid.
VOUCHED = 4.0
# Log ratios change by this much per octave (root mean square) where too few cells lie close enough to show by how much:
# the growth with distance of the differences between cells of the committed results.
ROUGHNESS = 0.2
# The share of that change that the plane does not foresee, so that `Estimate.doubt` is what its description says.
_UNFORESEEN = 0.7
# A 95% interval in standard deviations of a normal variable.
_INTERVAL = 2 * 1.96

_UNKNOWN = Standing(math.nan, math.nan, math.nan, 0)

Place = tuple[float, ...]  # logarithms to base 2 of the sizes on the free axes: distances are in octaves


class _Column(NamedTuple):
    """A choice at the cells of a model that say something of it: their rows, log ratios and variances, each (cells,),
    and whether it was tried there or only its kernel in another configuration (`untried`)."""

    rows: Rows
    ratios: Floats
    variances: Floats
    tried: Mask


@dataclass(frozen=True)
class RegretModel:
    """The verdicts of one static key as a model over all sizes; `free` gives the axes that distances are measured on.

    `beside` are verdicts of other keys that tell of this one: what they are away counts as a further axis. With `waves`
    so does what a call leaves idle of its last one.

    All values are rounded to `LOG_RESOLUTION`, so that they are the same on every machine. Verdicts without a time
    of the model's reference take no part in estimates: their ratios are to another time.
    """

    verdicts: tuple[Verdict, ...]
    free: tuple[int, ...]
    beside: tuple[Verdict, ...] = ()
    waves: Waves | None = None

    @cached_property
    def reference(self) -> Choice:
        """What ratios are to: the default if it has a time, else the most frequent reference."""
        counts = Counter(verdict.reference for verdict in self.verdicts)
        return min(counts, key=lambda choice: (choice != self.verdicts[0].default, -counts[choice], choice))

    @cached_property
    def default_is_measured(self) -> bool:
        """Whether the default has a time in any cell."""
        return any(verdict.default in verdict.standings for verdict in self.verdicts)

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Every choice with a time, in ascending order."""
        return tuple(sorted({choice for verdict in self._own for choice in verdict.standings}))

    def estimate(self, choice: Choice, sizes: Sizes) -> Estimate | None:
        """What is expected of the choice at these sizes; None where it has no time under this key."""
        return self.estimates((choice,), sizes).get(choice)

    def estimates(self, choices: Collection[Choice], sizes: Sizes) -> dict[Choice, Estimate]:
        """What is expected of each of the choices at these sizes, but those without a time under this key."""
        found = self.estimates_at(choices, (sizes,))
        return {choice: Estimate(*(float(values[0]) for values in estimates)) for choice, estimates in found.items()}

    def estimates_at(self, choices: Collection[Choice], sizes: Sequence[Sizes]) -> dict[Choice, Estimates]:
        """What is expected of each of the choices at each of many sizes, but choices without a time under this key."""
        known = [choice for choice in choices if choice in self.choices]
        if not known:
            return {}
        offsets, distances = self._offsets(sizes)
        nothing = np.zeros(len(sizes))
        return {
            choice: Estimates(nothing, nothing, nothing)
            if choice == self.reference
            else self._estimates(choice, offsets, distances)
            for choice in known
        }

    def shares_around(self, conditions: Sequence[Callable[[Verdict], bool]], sizes: Sequence[Sizes]) -> Floats:
        """The shares of the measured cells around each of these sizes, weighted as in an estimate, of which each
        condition holds: (sizes, conditions)."""
        _, distances = self._offsets(sizes)
        shares = self._shares(distances)
        sums = total(shares)
        held = (np.array([holds(verdict) for verdict in self._measured]) for holds in conditions)
        return np.stack([total(shares * cells[:, None]) / sums for cells in held], axis=1)

    def _offsets(self, sizes: Sequence[Sizes]) -> tuple[list[Floats], Floats]:
        """Offsets (cells, sizes) along each axis from these sizes to the measured cells, and distances (cells, sizes),
        in octaves."""
        places = np.array([self._place(each, 0.0) for each in sizes])
        offsets = [cells[:, None] - line for cells, line in zip(self._places.T, places.T, strict=True)]
        squares = sum_of([offset * offset for offset in offsets])
        if self.waves is None:
            return offsets, np.sqrt(squares)
        idle = self.waves.idle((self.verdicts[0].context, each) for each in sizes)
        last = [cells[:, None] - line for cells, line in zip(self._idle.T, idle.T, strict=True)]
        return [*offsets, *last], np.sqrt(squares + _WAVE**2 * sum_of([offset * offset for offset in last]))

    def _shares(self, distances: Floats) -> Floats:
        """How much each cell says at each place, before it is divided by the sum; of distances (cells, places)."""
        ordered = np.sort(distances, axis=0)
        last = ordered[min(_NEIGHBOURS, len(ordered)) - 1]
        reach = np.maximum(np.minimum(reach_over(self.free), _BEYOND * last), _WIDENING * ordered[0])
        # A lone cell may lie at the place itself.
        shares: Floats = np.maximum(1.0 - distances / np.maximum(reach, LOG_RESOLUTION), 0.0)
        return shares

    def _estimates(self, choice: Choice, offsets: Sequence[Floats], distances: Floats) -> Estimates:
        """From offsets (cells, sizes) along each axis and distances (cells, sizes) of the measured cells in octaves."""
        rows, ratios, variances, tried = self._held(choice)
        offsets, distances = [offset[rows] for offset in offsets], distances[rows]
        nearest = distances[tried].min(axis=0)
        shares = self._shares(distances)
        # Of each place the cells that say something of it, in their order: most lie beyond its reach.
        speaking = shares > 0.0
        near = np.argsort(~speaking, axis=0, kind="stable")[: int(speaking.sum(axis=0).max())]
        shares, *offsets = (np.take_along_axis(values, near, axis=0) for values in (shares, *offsets))
        ratios, variances = ratios[near], variances[near]
        sums = total(shares)
        weights = shares / sums
        height, slopes = local_planes(weights, offsets, ratios, _RIDGE / sums)
        foreseen = sum_of([slope * offset for slope, offset in zip(slopes, offsets, strict=True)])
        residuals = ratios - height - foreseen
        downside = total(weights * np.maximum(residuals, 0.0) ** 2)
        spread = total(weights * residuals**2)
        noise = total(weights * variances)
        change = (_UNFORESEEN * self._roughness(choice) * nearest) ** 2
        return Estimates(
            _rounded(height),
            _rounded(height + DEVIATIONS * np.sqrt(downside)),
            _rounded(np.sqrt(spread + noise + change)),
        )

    def expected_regret(self, choice: Choice, sizes: Sizes) -> float:
        """Expected log(time of the choice / time of the best) at these sizes, infinite for a choice without a time.

        The largest expected loss to any one other choice, both taken to be normal around their estimates (as expected
        improvement in Jones, Schonlau and Welch, 1998): what a measurement there may at best be worth.
        """
        found = self.estimates((choice, *self.choices), sizes)
        own = found.pop(choice, None)
        if own is None:
            return math.inf
        return largest_loss(own, found.values())

    def best(self, sizes: Sizes) -> Choice:
        """The choice that is expected to be fastest at these sizes."""
        found = self.estimates(self.choices, sizes)
        return min(found, key=lambda choice: (found[choice].log_ratio, choice))

    def alike(self, choice: Choice, sizes: Sizes, margin: float) -> frozenset[Choice]:
        """The choices that are expected to take at most (1 + margin) times this one's time; it is among them."""
        found = self.estimates((choice, *self.choices), sizes)
        limit = (found[choice].log_ratio if choice in found else math.inf) + math.log1p(margin)
        return frozenset({choice, *(other for other, estimate in found.items() if estimate.log_ratio <= limit)})

    @cached_property
    def _measured(self) -> tuple[Verdict, ...]:
        """The cells that hold the reference, those of this key first."""
        return (*self._own, *(verdict for verdict in self.beside if self.reference in verdict.standings))

    @cached_property
    def _own(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if self.reference in verdict.standings)

    @cached_property
    def _standings(self) -> tuple[Mapping[Choice, Standing], ...]:
        """Of each measured cell, to the model's reference."""
        return tuple(_rebased(verdict, self.reference) for verdict in self._measured)

    @cached_property
    def _places(self) -> Floats:
        """Where the measured cells lie on the free axes, and how far away their keys are."""
        return np.array([self._place(verdict.sizes, verdict.away) for verdict in self._measured])

    @cached_property
    def _idle(self) -> Floats:
        """What the calls of the measured cells leave idle of their last waves."""
        assert self.waves is not None
        return self.waves.idle_beside((verdict.context, verdict.sizes, verdict.away) for verdict in self._measured)

    def _place(self, sizes: Sizes, away: float) -> Place:
        return (*place_of(sizes, self.free), away) if self.beside else place_of(sizes, self.free)

    def _held(self, choice: Choice) -> _Column:
        """What is known of a choice."""
        if choice not in self._columns:
            tried, variances = self._times(choice)
            base, base_variances = self._base_of(choice, tried)
            ratios = with_untried(tried, base, self._places, self._shares)
            rows = np.flatnonzero(~np.isnan(ratios))
            known = np.where(np.isnan(tried), base_variances, variances)
            self._columns[choice] = _Column(rows, ratios[rows], known[rows], ~np.isnan(tried[rows]))
        return self._columns[choice]

    def _times(self, choice: Choice) -> tuple[Floats, Floats]:
        """Log ratios at the measured cells and their variances, NaN where the choice has no time."""
        held = [standings.get(choice, _UNKNOWN) for standings in self._standings]
        ratios = np.array([standing.log_ratio for standing in held])
        return ratios, np.array([_variance(standing) for standing in held])

    def _base_of(self, choice: Choice, tried: Floats) -> tuple[Floats, Floats]:
        """The times of the most measured choice of the kernel that was tried where this one was; its own where no other
        has more of them."""
        for other in self._by_times[choice[0]]:
            times, variances = self._times(other)
            if other == choice or not np.isnan(times + tried).all():
                break
        return times, variances

    @cached_property
    def _by_times(self) -> Mapping[str, Sequence[Choice]]:
        """Of each kernel the choices, those with the most times first."""
        counts = Counter(choice for standings in self._standings for choice in standings)
        found: dict[str, list[Choice]] = {}
        for choice in sorted(counts, key=lambda choice: (-counts[choice], choice)):
            found.setdefault(choice[0], []).append(choice)
        return found

    @cached_property
    def _columns(self) -> dict[Choice, _Column]:
        """Those that were asked for."""
        return {}

    def _roughness(self, choice: Choice) -> float:
        """Root mean square change of the choice's log ratio per octave, over pairs of cells within reach of each other,
        and one octave of `ROUGHNESS` beside them."""
        if choice not in self._roughnesses:
            first, second, distances = self._pairs
            ratios, _ = self._times(choice)
            changes = ratios[first] - ratios[second]
            both = ~np.isnan(changes)
            squares = math.fsum([ROUGHNESS**2, *np.square(changes[both]).tolist()])
            octaves = math.fsum([1.0, *np.square(distances[both]).tolist()])
            self._roughnesses[choice] = math.sqrt(squares / octaves)
        return self._roughnesses[choice]

    @cached_property
    def _roughnesses(self) -> dict[Choice, float]:
        """Those that were asked for."""
        return {}

    @cached_property
    def _pairs(self) -> tuple[Rows, Rows, Floats]:
        """The pairs of measured cells of this key within reach of each other, and their distances."""
        reach = reach_over(self.free)
        places = self._places[: len(self._own)].tolist()
        pairs = [
            (first, second, distance)
            for first, place in enumerate(places)
            for second, other in enumerate(places[:first])
            if (distance := math.dist(place, other)) <= reach
        ]
        first, second, distances = zip(*pairs, strict=True) if pairs else ((), (), ())
        return np.array(first, dtype=np.intp), np.array(second, dtype=np.intp), np.array(distances)


def place_of(sizes: Sizes, free: Sequence[int]) -> Place:
    """Where sizes lie on the free axes."""
    return tuple(math.log2(sizes[axis]) for axis in free)


def reach_over(free: Sequence[int]) -> float:
    """How far a cell speaks for other sizes, in octaves."""
    return math.log2(REACH) * math.sqrt(len(free))


def vouching(cells: Floats, places: Place | Floats) -> Mask:
    """Which of the measured cells, (cells, axes), lie within a factor of `VOUCHED` of a place on every axis; of cells,
    (cells, 1, axes), and places, (places, axes), which of each pair."""
    near: Mask = (np.abs(cells - np.asarray(places)) <= math.log2(VOUCHED) + LOG_RESOLUTION).all(axis=-1)
    return near


def _rebased(verdict: Verdict, reference: Choice) -> Mapping[Choice, Standing]:
    """The verdict's standings to another reference: each ratio through that one's, with the doubt of both."""
    if verdict.reference == reference:
        return verdict.standings
    base = verdict.standings[reference]
    found = {reference: Standing(0.0, 0.0, 0.0, base.rounds)}
    for choice, standing in verdict.standings.items():
        if choice != reference:
            ratio = standing.log_ratio - base.log_ratio
            half = math.hypot(standing.high - standing.low, base.high - base.low) / 2.0
            found[choice] = Standing(ratio, ratio - half, ratio + half, min(standing.rounds, base.rounds))
    return found


def _variance(standing: Standing) -> float:
    return ((standing.high - standing.low) / _INTERVAL) ** 2 if standing.rounds else 0.0


def _rounded(logarithms: Floats) -> Floats:
    return np.rint(logarithms / LOG_RESOLUTION) * LOG_RESOLUTION
