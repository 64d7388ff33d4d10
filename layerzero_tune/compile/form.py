"""The intermediate form between verdicts and the generated module: immutable, independent of how it is printed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from layerzero_runtime.operation import Sizes, StaticKey
from layerzero_runtime.selection.limits import Limit
from layerzero_tune.compile.feature import Axes, Feature
from layerzero_tune.compile.judge import Choice
from layerzero_tune.compile.region import Box, Region


@dataclass(frozen=True)
class Step:
    """A choice and the guards that a call must pass to get it."""

    choice: Choice
    guards: tuple[Limit, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """Why a leaf holds its first choice, for `explain`.

    Attributes:
        points: measured sizes of the bucket: those inside the leaf, and where misses part a bucket into several leaves
            with one chain, those inside all of them.
        speedup: geometric mean of the default's time over the choice's, None where the default has no time.
        least_speedup: the lower end of its 95% interval, None also for the default itself.
        runner_up: the next best choice over these points and how much slower it is, None without one.
        rounds: paired rounds behind the choice, over all points.
    """

    points: tuple[Sizes, ...]
    speedup: float | None
    least_speedup: float | None
    runner_up: str | None
    margin: float | None
    rounds: int
    measured_at: str


@dataclass(frozen=True)
class Leaf:
    """A bucket: its chain of plans, best first; an empty chain is a miss."""

    region: Region
    chain: tuple[Step, ...]
    evidence: Evidence | None


@dataclass(frozen=True)
class Split:
    """`low` serves sizes at which the feature is at most the edge, `high` those above."""

    feature: Feature
    edge: int
    low: Tree
    high: Tree


Tree = Leaf | Split


@dataclass(frozen=True)
class Entry:
    """One static key: the range that was measured, and the decisions inside it.

    Attributes:
        axes: names of all axes, in the order of the decision function's parameters.
        free: indices of the axes that are not tied under this key.
        bounds: measured range per axis.
        max_product: largest product of the free sizes that was measured, None where the whole box is covered.
    """

    operation: str
    static_key: StaticKey
    axes: tuple[str, ...]
    free: Axes
    bounds: Box
    max_product: int | None
    tree: Tree

    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(leaves_of(self.tree))

    def covers(self, sizes: Sizes) -> bool:
        """Whether the sizes lie in the measured range; outside it the table misses."""
        inside = all(self.bounds[axis][0] <= sizes[axis] <= self.bounds[axis][1] for axis in self.free)
        return inside and (self.max_product is None or math.prod(sizes[axis] for axis in self.free) <= self.max_product)


@dataclass(frozen=True)
class TableForm:
    """A whole table before it is printed; `kernels` is what staleness is judged by."""

    device: Mapping[str, Any]
    provenance: Mapping[str, Any]
    kernels: Mapping[str, Mapping[str, str]]
    entries: tuple[Entry, ...]


def leaves_of(tree: Tree) -> Iterator[Leaf]:
    """The leaves from low sizes to high ones."""
    if isinstance(tree, Leaf):
        yield tree
    else:
        yield from leaves_of(tree.low)
        yield from leaves_of(tree.high)
