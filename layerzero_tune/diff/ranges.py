"""Ranges of sizes by what they hold for, named as in the evidence: an axis, a product ("rows * hidden_size"), or a
balance of waves ("wave_balance(batch_kv_heads, seq_len_q, 132)")."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from layerzero_tune.compile.feature import NamedFeature, feature_at, span
from layerzero_tune.compile.wave_balance import WaveBalance, parse_balance

Ranges = Mapping[str, tuple[int, int]]  # inclusive, axes in the order of the operation's


@lru_cache(maxsize=1024)
def _feature(name: str) -> NamedFeature:
    return parse_balance(name) or tuple(name.split(" * "))


def axes_of(name: str) -> Sequence[str]:
    feature = _feature(name)
    return (feature.count, feature.rows) if isinstance(feature, WaveBalance) else feature


def box_of(ranges: Ranges) -> Ranges:
    """The ranges of axes alone."""
    return {name: bounds for name, bounds in ranges.items() if len(axes_of(name)) == 1}


def holds(ranges: Ranges, sizes: Mapping[str, int]) -> bool:
    return all(low <= feature_at(sizes, _feature(name)) <= high for name, (low, high) in ranges.items())


def common(first: Ranges, second: Ranges) -> Ranges | None:
    """The sizes in both, which have the same axes; None where there are none."""
    found = {
        name: (
            max(ranges[name][0] for ranges in (first, second) if name in ranges),
            min(ranges[name][1] for ranges in (first, second) if name in ranges),
        )
        for name in {**box_of(first), **first, **second}
    }
    return found if all(_reaches(found, name, bounds) for name, bounds in found.items()) else None


def _reaches(ranges: Ranges, name: str, bounds: tuple[int, int]) -> bool:
    """Whether some sizes of the axes' ranges may have a feature in these bounds."""
    low, high = span(_feature(name), ranges)
    return max(low, bounds[0]) <= min(high, bounds[1])


def complete(ranges: Ranges, names: Iterable[str]) -> Ranges:
    """The same sizes with a range for each of these features too."""
    return dict(ranges) | {name: span(_feature(name), ranges) for name in names if name not in ranges}


def concise(ranges: Ranges) -> Ranges:
    """The same sizes without the features that the axes' ranges imply."""
    implied = complete(box_of(ranges), ranges)
    return {name: bounds for name, bounds in ranges.items() if name in box_of(ranges) or bounds != implied[name]}


def sizes_inside(ranges: Ranges) -> Mapping[str, int] | None:
    """Sizes within the ranges, as near to their middle as the diagonal of the box has some; None where it has none."""
    for step in sorted(range(33), key=lambda step: abs(step - 16)):
        sizes = {
            name: min(max(round(low * (high / low) ** (step / 32)), low), high)
            for name, (low, high) in box_of(ranges).items()
        }
        if holds(ranges, sizes):
            return sizes
    return None
