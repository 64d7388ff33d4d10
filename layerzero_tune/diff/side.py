"""`Side`: one side of a comparison, a device's table with the measurements behind it where they are at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.operation import Operation, Sizes, StaticKey
from layerzero_runtime.tables.table import MISS
from layerzero_tune.compile.form import Step
from layerzero_tune.compile.judge import Choice, Verdict
from layerzero_tune.diff.ranges import Ranges, box_of

EntryKey = tuple[str, StaticKey]


@dataclass(frozen=True)
class Bucket:
    """A leaf of a table: its chain of plans (empty: sizes that were not measured) and what `evidence.json` says."""

    ranges: Ranges
    chain: tuple[Step, ...]
    evidence: Mapping[str, Any] | None


@dataclass(frozen=True)
class SideEntry:
    """What one side holds for a static key.

    Attributes:
        decide: sizes on all axes to the number of a bucket, MISS outside the measured range.
        max_product: the largest product of the free sizes that is served, None where the whole range is.
    """

    operation: Operation
    static_key: StaticKey
    decide: Callable[..., int]
    buckets: tuple[Bucket, ...]
    max_product: int | None

    @property
    def ranges(self) -> Ranges:
        """The measured range of each free axis: what all buckets cover together."""
        found = [box_of(bucket.ranges) for bucket in self.buckets]
        return {name: (min(r[name][0] for r in found), max(r[name][1] for r in found)) for name in found[0]}

    def sizes(self, free: Mapping[str, int]) -> Sizes:
        """Sizes on all axes from those on the free ones: a tied axis repeats the one before it."""
        sizes: list[int] = []
        for axis in self.operation.axes:
            sizes.append(free[axis.name] if axis.name in free else sizes[-1])
        return tuple(sizes)

    def plan(self, sizes: Sizes) -> Choice | None:
        """What serves a call of these sizes, None for a miss. A guard on anything but an axis is taken to hold, as it
        does for dense tensors."""
        leaf = self.decide(*sizes)
        if leaf == MISS:
            return None
        named = {axis.name: size for axis, size in zip(self.operation.axes, sizes, strict=True)}
        for step in self.buckets[leaf].chain:
            if all(guard.accepts(named[guard.field]) for guard in step.guards if guard.field in named):
                return step.choice
        return None


@dataclass(frozen=True)
class Side:
    """A table to compare.

    Attributes:
        path: the folder that it was read from.
        kernels: for each kernel of its plans what it was measured with, as in `Table.kernels`.
        sources: the hash of a kernel's code, for these and for all that the measurements at hand hold.
        verdicts: what the measurements say, by static key; empty where none are at hand.
        contests, disturbed: how many contests these are, and during how many other processes took more than `MAX_SHARE`
            of the machine.
    """

    path: Path
    device: DeviceSpec
    provenance: Mapping[str, Any]
    kernels: Mapping[str, Mapping[str, str]]
    sources: Mapping[str, str]
    entries: Mapping[EntryKey, SideEntry]
    verdicts: Mapping[EntryKey, tuple[Verdict, ...]]
    contests: int
    disturbed: int

    def plan(self, key: EntryKey, sizes: Sizes) -> Choice | None:
        """What serves a call, None for a miss."""
        entry = self.entries.get(key)
        return None if entry is None else entry.plan(sizes)
