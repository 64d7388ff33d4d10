"""Features: what a split compares with its edge, a size, a product of sizes, or the balance of a call's waves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from layerzero_tune.compile.wave_balance import Axis, ByAxis, WaveBalance

Range = tuple[int, int]  # inclusive
Axes = tuple[int, ...]  # one axis, or those whose sizes are multiplied, ascending
Feature = Axes | WaveBalance[int]
NamedFeature = tuple[str, ...] | WaveBalance[str]  # by the names of axes, as evidence has it


def features_over(free: Axes, balance: WaveBalance[int] | None) -> tuple[Feature, ...]:
    """All that splits of a static key may compare."""
    products = (axes for count in range(1, len(free) + 1) for axes in combinations(free, count))
    return (*products, *(() if balance is None else (balance,)))


def feature_at(sizes: ByAxis[Axis, int], feature: tuple[Axis, ...] | WaveBalance[Axis]) -> int:
    """The feature of a call of these sizes."""
    if isinstance(feature, WaveBalance):
        return feature.of(sizes)
    return math.prod(sizes[axis] for axis in feature)


def features_at(sizes: NDArray[np.int64], feature: Feature) -> NDArray[np.int64]:
    """The same of sizes (places, axes), for each place."""
    if isinstance(feature, WaveBalance):
        return feature.of_all(sizes)
    found: NDArray[np.int64] = sizes[:, list(feature)].prod(axis=1)
    return found


def span(feature: tuple[Axis, ...] | WaveBalance[Axis], ranges: ByAxis[Axis, Range]) -> Range:
    """The bounds of the feature where each axis has sizes in its range."""
    if isinstance(feature, WaveBalance):
        return feature.span(ranges)
    return math.prod(ranges[axis][0] for axis in feature), math.prod(ranges[axis][1] for axis in feature)


def factors_of(feature: Feature) -> int:
    """How many sizes it multiplies; 1 where none."""
    return 1 if isinstance(feature, WaveBalance) else len(feature)


def is_axis(feature: Feature) -> bool:
    """Whether it is the size of a single axis."""
    return not isinstance(feature, WaveBalance) and len(feature) == 1


def order_of(feature: Feature) -> tuple[bool, Axes]:
    """By which features sort: products by their axes, balances after them."""
    return (True, ()) if isinstance(feature, WaveBalance) else (False, feature)


def feature_name(feature: Feature, axes: Sequence[str]) -> str:
    """What evidence calls it, by the names of all axes."""
    if isinstance(feature, WaveBalance):
        return str(feature.named(axes))
    return " * ".join(axes[axis] for axis in feature)


def condition(feature: Feature, edge: int, axes: Sequence[str]) -> str:
    """That the feature is at most the edge, in the syntax of generated tables."""
    if isinstance(feature, WaveBalance):
        return feature.named(axes).condition(edge)
    return f"{feature_name(feature, axes)} <= {edge}"
