"""Where to split: the feature and the place after which least is lost.

Kernels part along single sizes (a tile is filled, all cores have work) or along products of them (the work in a call).
Cross-validated on results of two CPUs (5,652 cells of each left out), splits over products besides those on one axis
lift the efficiency from 0.9858 to 0.9887 on a Xeon, with half the buckets. Kernels whose tiles differ in height part by
the waves of a call (`wave_balance`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from layerzero_tune.compile.arrays import Mask, Rows
from layerzero_tune.compile.feature import Axes, Feature, factors_of, order_of
from layerzero_tune.compile.ground import Ground
from layerzero_tune.compile.local_plane import total

# Mean log time over a key that one more bucket must save. Cross-validated on three results (efficiency; buckets of the
# whole): 0.0001 gives 0.9870 and 195, 0.0003 0.9877 and 188, 0.0005 0.9879 and 177, 0.001 0.9874 and 128.
BUCKET_PRICE = 0.0003
# What remains after a split over a product counts this much more, and this much mean log time beside, where features
# are chosen to be looked into, and in the split that is looked at: one axis is read more easily, and what little a
# product gains beside it may be noise. Counted in the choice among those too, trees lose 0.0049 in place of 0.0047;
# counted for balances of waves as well, left-out cells of attention of an H100 lose 0.0184 in place of 0.0180.
_PRODUCT_SURCHARGE = (1.25, 0.0001)
# Of so many features it is looked one split further: what is lost with one choice on either side says little where
# kernels part along both sizes. Trees over the attention of an H100 lose 0.0074 by their model with 1, 0.0047 with 3
# and with all 7 (calls half an octave beside those of a workload).
_LOOKED_INTO = 3
# Of the losses that are compared.
_LAST_DIGIT = 1e-12


@dataclass(frozen=True)
class Place:
    """Between which values of a feature a split belongs."""

    feature: Feature
    low: int
    high: int


@dataclass(frozen=True)
class _Cut:
    """The best split by one feature.

    Attributes:
        loss: what remains with one choice on either side; over a product with its surcharge.
        uneven: by how many places one side is larger than the other.
    """

    place: Place
    loss: float
    uneven: int

    @property
    def rank(self) -> tuple[float, int, int, tuple[bool, Axes]]:
        """Of places that cost the same the one over the fewest factors and with the most even sides, so that the tree
        stays shallow."""
        feature = self.place.feature
        return (self.loss, factors_of(feature), self.uneven, order_of(feature))


def best_place(ground: Ground, rows: Rows, features: Sequence[Feature]) -> Place | None:
    """Where either side, split once more or not, loses least; None where no split leaves a measured cell on each side.

    Of places that cost the same it is the one after which one choice on either side loses least.
    """
    cuts = sorted(_cuts(ground, rows, features), key=lambda cut: cut.rank)[:_LOOKED_INTO]
    if len(cuts) < 2:
        return cuts[0].place if cuts else None

    def after(cut: _Cut) -> float:
        is_low = ground.features(rows, cut.place.feature) <= cut.place.low
        return round(_after_one(ground, rows[is_low], features) + _after_one(ground, rows[~is_low], features), 12)

    return min(cuts, key=lambda cut: (after(cut), cut.rank)).place


def _after_one(ground: Ground, rows: Rows, features: Sequence[Feature]) -> float:
    """What remains of these places with one choice, or if that is worth it after one split."""
    single = round(float(total(ground.losses[rows]).min()), 12)
    if single < BUCKET_PRICE:
        return single
    return min([single, *(cut.loss + BUCKET_PRICE for cut in _cuts(ground, rows, features))])


def _cuts(ground: Ground, rows: Rows, features: Sequence[Feature]) -> Iterator[_Cut]:
    for feature in features:
        unordered = ground.features(rows, feature)
        order = np.argsort(unordered, kind="stable")
        values = unordered[order]
        candidates = np.flatnonzero((values[1:] > values[:-1]) & told_on_both_sides(ground, rows[order]))
        if not len(candidates):
            continue
        low_sums = np.cumsum(ground.losses[rows[order]], axis=0)
        high_sums = low_sums[-1] - low_sums
        left = (low_sums.min(axis=1) + high_sums.min(axis=1))[candidates]
        # Not numpy's rounding, which depends on the last bits of a product. What lies further above the least than a
        # unit of the last digit is never rounded to the same.
        is_near = left < left.min() + 2.0 * _LAST_DIGIT
        near = candidates[is_near]
        rounded = [round(loss, 12) for loss in left[is_near].tolist()]
        loss = min(rounded)
        cheapest = near[[each == loss for each in rounded]]
        uneven = np.abs(2 * (cheapest + 1) - len(order))
        last = int(cheapest[uneven.argmin()])
        if factors_of(feature) > 1:
            loss = round(loss * _PRODUCT_SURCHARGE[0] + _PRODUCT_SURCHARGE[1], 12)
        yield _Cut(Place(feature, int(values[last]), int(values[last + 1])), loss, int(uneven.min()))


def told_on_both_sides(ground: Ground, rows: Rows) -> Mask:
    """After which of the rows, but the last, a split leaves a measured cell on each side."""
    held = np.cumsum(ground.measured[rows])
    told: Mask = (held > 0) & (held < held[-1])
    return told[:-1]
