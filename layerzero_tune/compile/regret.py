"""The regret model: what each choice is expected to cost at any sizes of one static key, and how sure that is.

One model serves the compiler (which gains hold between the measured sizes, where a table must miss), the tuner (what to
measure next) and the agreement of two tables (which plans a table takes for as good as its own). Kernels' times jump
with whether a length is even or fills whole tiles, so nothing global is fitted: only the cells nearby speak.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.judge import Choice, Standing, Verdict
from layerzero_tune.compile.local_plane import Vector, dot, local_plane
from layerzero_tune.measure.statistics import LOG_RESOLUTION

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A cell speaks for sizes up to this factor away, with a weight that falls linearly in log distance (over several axes
# the Euclidean one). Of the reaches and kernels tried on the committed results (5,789 cells predicted without
# themselves), a plane over this one has the smallest root mean square error of the log ratio: 0.153. The weighted mean
# without slopes 0.178 at best, the nearest cell 0.245, kriging with a nugget 0.156.
REACH = 2.0**1.5
# Variance of the offsets (in squared octaves, at a total weight of 1 cell) that the slopes of the plane must beat.
_RIDGE = 0.1
# Where all cells are further away, the reach is this multiple of the nearest one's distance.
_WIDENING = 1.5
# How many downside deviations of the surroundings a mean gain must exceed to hold between the cells. On a Xeon with 2
# cores, judged by 400 shapes outside the results: without this condition the table was slower than the default at 4.
DEVIATIONS = 1.0
# A cell vouches for sizes within this factor on every axis: half of the widest step (16x) between neighbours of a grid.
VOUCHED = 4.0
# Log ratios change by this much per octave (root mean square) where too few cells lie close enough to show by how much:
# the growth with distance of the differences between cells of the committed results.
ROUGHNESS = 0.2
# The share of that change that the plane does not foresee, so that `Estimate.doubt` is what its description says.
_UNFORESEEN = 0.7
# A 95% interval in standard deviations of a normal variable.
_INTERVAL = 2 * 1.96

Place = Vector  # logarithms to base 2 of the sizes on the free axes: distances are in octaves


@dataclass(frozen=True)
class Estimate:
    """What is expected of a choice at some sizes, in log(time / time of the reference); negative is faster.

    Attributes:
        log_ratio: the height at these sizes of a plane through the cells around.
        upper: that and `DEVIATIONS` downside deviations from the plane (Sortino): only what is slower than the plane
            counts, for cells that gain even more are no reason for doubt.
        doubt: standard deviation of what the choice may really take: the spread about the plane, the intervals of the
            measurements (a screening's bounds say nothing of what is likely), and what may change over the distance to
            the nearest of them. On the committed results, cells predicted without themselves: in six groups by doubt
            (0.017 to 0.32) the root mean square errors are 0.025 to 0.28; 74% lie within it, 94% within twice.
    """

    log_ratio: float
    upper: float
    doubt: float


@dataclass(frozen=True)
class RegretModel:
    """The verdicts of one static key as a model over all sizes; `free` gives the axes that distances are measured on.

    All values are rounded to `LOG_RESOLUTION`, so that they are the same on every machine. Verdicts with another
    reference than the model's take no part in estimates: their ratios are to another time.
    """

    verdicts: tuple[Verdict, ...]
    free: tuple[int, ...]

    @cached_property
    def reference(self) -> Choice:
        """What ratios are to: the default if it has a time, else the most frequent reference."""
        counts = Counter(verdict.reference for verdict in self.verdicts)
        return min(counts, key=lambda choice: (choice != self.verdicts[0].default, -counts[choice], choice))

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Every choice with a time, in ascending order."""
        return tuple(sorted({choice for standings in self._standings for choice in standings}))

    def estimate(self, choice: Choice, sizes: Sizes) -> Estimate | None:
        """What is expected of the choice at these sizes; None where it has no time under this key."""
        return self.estimates((choice,), sizes).get(choice)

    def estimates(self, choices: Collection[Choice], sizes: Sizes) -> dict[Choice, Estimate]:
        """What is expected of each of the choices at these sizes, but those without a time under this key."""
        found = {choice: Estimate(0.0, 0.0, 0.0) for choice in choices if choice == self.reference}
        others = [choice for choice in choices if choice != self.reference]
        if not others:
            return found
        place = place_of(sizes, self.free)
        offsets = [[there - here for there in line] for line, here in zip(self._lines, place, strict=True)]
        distances = list(map(math.hypot, *offsets))
        usual = reach_over(self.free)
        near = [cell for cell, distance in enumerate(distances) if distance < usual]
        for choice in others:
            held = [cell for cell in near if choice in self._standings[cell]]
            nearest = min((distances[cell] for cell in held), default=math.inf)
            reach = usual
            if _WIDENING * nearest > usual:
                held = [cell for cell, standings in enumerate(self._standings) if choice in standings]
                nearest = min((distances[cell] for cell in held), default=math.inf)
                reach = max(usual, _WIDENING * nearest)
                held = [cell for cell in held if distances[cell] < reach]
            if held:
                around = [
                    _Neighbour(
                        1.0 - distances[cell] / reach,
                        tuple(line[cell] for line in offsets),
                        self._standings[cell][choice],
                    )
                    for cell in held
                ]
                found[choice] = self._estimate(choice, around, nearest)
        return found

    def _estimate(self, choice: Choice, around: Sequence[_Neighbour], nearest: float) -> Estimate:
        """From the cells within reach, the nearest of which is that many octaves away."""
        total = math.fsum(cell.share for cell in around)
        weights = [cell.share / total for cell in around]
        offsets = [cell.offset for cell in around]
        ratios = [cell.standing.log_ratio for cell in around]
        height, slopes = local_plane(weights, offsets, ratios, _RIDGE / total)
        residuals = [ratio - height - dot(slopes, offset) for ratio, offset in zip(ratios, offsets, strict=True)]
        downside = dot(weights, [max(residual, 0.0) ** 2 for residual in residuals])
        spread = dot(weights, [residual**2 for residual in residuals])
        noise = dot(weights, [_variance(cell.standing) for cell in around])
        change = (_UNFORESEEN * self._roughness(choice) * nearest) ** 2
        return Estimate(
            _rounded(height),
            _rounded(height + DEVIATIONS * math.sqrt(downside)),
            _rounded(math.sqrt(spread + noise + change)),
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
        return tuple(verdict for verdict in self.verdicts if verdict.reference == self.reference)

    @cached_property
    def _standings(self) -> tuple[Mapping[Choice, Standing], ...]:
        return tuple(verdict.standings for verdict in self._measured)

    @cached_property
    def _lines(self) -> tuple[Vector, ...]:
        """Where the measured cells lie along each free axis."""
        return tuple(zip(*(place_of(verdict.sizes, self.free) for verdict in self._measured), strict=True))

    def _roughness(self, choice: Choice) -> float:
        """Root mean square change of the choice's log ratio per octave, over pairs of cells within reach of each other,
        and one octave of `ROUGHNESS` beside them."""
        if choice not in self._roughnesses:
            first, second, distances = self._pairs
            unknown = Standing(math.nan, math.nan, math.nan, 0)
            ratios = np.array([standings.get(choice, unknown).log_ratio for standings in self._standings])
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
    def _pairs(self) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
        """The pairs of measured cells within reach of each other, and their distances."""
        reach = reach_over(self.free)
        places = list(zip(*self._lines, strict=True))
        pairs = [
            (first, second, distance)
            for first, place in enumerate(places)
            for second, other in enumerate(places[:first])
            if (distance := math.dist(place, other)) <= reach
        ]
        first, second, distances = zip(*pairs, strict=True) if pairs else ((), (), ())
        return np.array(first, dtype=np.intp), np.array(second, dtype=np.intp), np.array(distances)


class _Neighbour(NamedTuple):
    """A measured cell as seen from some sizes: its share in what they are expected to take, before all are scaled."""

    share: float
    offset: Vector
    standing: Standing


def place_of(sizes: Sizes, free: Sequence[int]) -> Place:
    """Where sizes lie on the free axes."""
    return tuple(math.log2(sizes[axis]) for axis in free)


def reach_over(free: Sequence[int]) -> float:
    """How far a cell speaks for other sizes, in octaves."""
    return math.log2(REACH) * math.sqrt(len(free))


def vouches(cell: Place, place: Place) -> bool:
    """Whether a measured cell lies within a factor of `VOUCHED` of a place on every axis."""
    reach = math.log2(VOUCHED) + LOG_RESOLUTION
    return all(abs(a - b) <= reach for a, b in zip(cell, place, strict=True))


def _variance(standing: Standing) -> float:
    return ((standing.high - standing.low) / _INTERVAL) ** 2 if standing.rounds else 0.0


def largest_loss(own: Estimate, others: Iterable[Estimate]) -> float:
    """The largest loss to any one of the others that is to be expected, 0 without any."""
    return max((_expected_loss(own, other) for other in others), default=0.0)


def _expected_loss(own: Estimate, other: Estimate) -> float:
    """E[max(0, own - other)] of two normal variables."""
    mean = own.log_ratio - other.log_ratio
    deviation = math.hypot(own.doubt, other.doubt)
    if deviation == 0.0:
        return max(0.0, mean)
    z = mean / deviation
    density = math.exp(-z * z / 2.0) / math.sqrt(2.0 * math.pi)
    return _rounded(mean * (1.0 + math.erf(z / math.sqrt(2.0))) / 2.0 + deviation * density)


def _rounded(logarithm: float) -> float:
    return round(logarithm / LOG_RESOLUTION) * LOG_RESOLUTION
