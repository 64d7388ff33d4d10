"""Placing the edge of a split: where what serves below it and what serves above it cost the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Self

import numpy as np
from numpy.typing import NDArray

from layerzero_tune.compile.arrays import Floats, Rows
from layerzero_tune.compile.feature import Feature
from layerzero_tune.compile.ground import Ground
from layerzero_tune.compile.split import Place, told_on_both_sides

# How many places on either side of a split tell where its sides meet.
_BESIDE = 16


@dataclass(frozen=True)
class Meeting:
    """The two sides of a split over some places, in the order of a feature of their sizes.

    The split lies where the sides together lose least, which need not be where it was first sought: then each side was
    one choice (alternating optimization: Carreira-Perpinan and Tavallali, 2018).

    Attributes:
        values: (places,) the feature's, ascending.
        losses: (2, places), where the side below serves a place, and where the one above does.
        columns: (2, places), those of the ground's chains that serve there.
        leads: (places,), the log time that is expected to be lost below beside above; NaN where that is not known.
        cuts: the least and the most places that may be below: between them nothing more is lost.
    """

    feature: Feature
    values: NDArray[np.int64]
    losses: Floats
    columns: NDArray[np.intp]
    leads: Floats
    cuts: tuple[int, int]

    @classmethod
    def of(cls, ground: Ground, rows: Rows, place: Place, below: Rows, above: Rows) -> Self:
        """`below` and `above` are the columns of the chains that either side gives at each of these places."""
        features = ground.features(rows, place.feature)
        order = np.argsort(features, kind="stable")
        rows, columns, values = rows[order], np.stack([below, above])[:, order], features[order]
        losses = np.stack([ground.losses[rows, side] for side in columns])
        allowed = (values[1:] > values[:-1]) & told_on_both_sides(ground, rows)
        if_below, if_above = np.cumsum(losses, axis=1)
        totals = (if_below + (if_above[-1] - if_above))[:-1]
        found = [(round(total, 12), cut + 1) for cut, total in enumerate(totals.tolist()) if allowed[cut]]
        least = min(total for total, _ in found)
        cuts = [cut for total, cut in found if total == least]
        leads = ground.expected[rows, columns[0]] - ground.expected[rows, columns[1]]
        return cls(place.feature, values, losses, columns, leads, (cuts[0], cuts[-1]))

    def at(self, place: Place) -> Self:
        """The same sides with the split left where it was sought."""
        cut = int(np.searchsorted(self.values, place.low, side="right"))
        return replace(self, cuts=(cut, cut))

    @property
    def place(self) -> Place:
        """Between which values the edge lies."""
        least, most = self.cuts
        return Place(self.feature, int(self.values[least - 1]), int(self.values[most]))

    @property
    def beside(self) -> tuple[Sequence[int], Sequence[int]]:
        """The columns of the chains that serve the places next to the edge, below and above it."""
        low, high = self.values == self.place.low, self.values == self.place.high
        below, above = self.columns[0], self.columns[1]
        return sorted(set(below[low].tolist())), sorted(set(above[high].tolist()))

    def loss(self, edge: int) -> float:
        """What is lost in all with this edge."""
        return round(math.fsum(np.where(self.values <= edge, self.losses[0], self.losses[1]).tolist()), 12)

    def crossing(self) -> int:
        """The last value at which the side below costs no more than the one above: the root of the regression line of
        their difference on the log of the value, over the nearest places on either side where they differ, but not
        beyond the two places; half way between these where it says nothing."""
        place = self.place
        half_way = isqrt(place.low * place.high)
        differ = (self.columns[0] != self.columns[1]) & ~np.isnan(self.leads)
        middle = sum(self.cuts) // 2
        low: list[int] = np.flatnonzero(differ[:middle])[-_BESIDE:].tolist()
        high: list[int] = np.flatnonzero(differ[middle:])[:_BESIDE].tolist()
        near = [*low, *(middle + above for above in high)]
        values = self.values[near].tolist()
        leads = self.leads[near].tolist()
        root = _root([(math.log(value / half_way), lead) for value, lead in zip(values, leads, strict=True)])
        if root is None:
            return half_way
        inside = min(max(root, math.log(place.low / half_way)), math.log(place.high / half_way))
        return min(max(round(half_way * math.exp(inside)), place.low), place.high - 1)


def _root(points: Sequence[tuple[float, float]]) -> float | None:
    """Where the regression line through the points rises through 0; None where it does not rise."""
    if not points:
        return None
    middle = math.fsum(at for at, _ in points) / len(points)
    level = math.fsum(lead for _, lead in points) / len(points)
    variance = math.fsum((at - middle) ** 2 for at, _ in points)
    covariance = math.fsum((at - middle) * (lead - level) for at, lead in points)
    return middle - level * variance / covariance if covariance > 0.0 else None
