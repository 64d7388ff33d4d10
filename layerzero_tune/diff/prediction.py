"""Predicting how two plans compare at a shape, from what both sides measured.

Times are never compared across runs (contract of the measurements): a ratio comes from contests that held both plans,
or, where no contest did, from two ratios to the default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from layerzero_runtime.operation import Sizes
from layerzero_runtime.tables.table import MISS
from layerzero_tune.compile.judge import Choice, Verdict
from layerzero_tune.diff.side import EntryKey, Side
from layerzero_tune.identity import canonical_json

# A measured shape speaks for sizes within this factor on every axis, as a cell of a grid does for a table's coverage.
REACH = 4.0

Basis = Literal["measured", "estimated"]


@dataclass(frozen=True)
class Estimate:
    """log(time of one plan / time of another).

    `basis` is "measured" where contests at this very shape held both; "estimated" where it is that of the nearest
    measured shape, the mean over a bucket, or taken through the default.
    """

    log_ratio: float
    basis: Basis


@dataclass(frozen=True)
class Predictor:
    """Predicts from both sides.

    On one device with a kernel unchanged both sides' measurements count alike: each side's table was chosen by its own,
    so either alone would flatter that side. Measurements of another device, or of another version of a kernel, say
    nothing of the new side, whose measurements then count alone.
    """

    old: Side
    new: Side

    def log_ratio(self, key: EntryKey, sizes: Sizes, old_plan: Choice, new_plan: Choice) -> Estimate | None:
        """log(time of the old plan / time of the new one), positive where the new plan is faster; None if unknown."""
        if old_plan == new_plan:
            return Estimate(0.0, "measured")
        comparable = self._is_unchanged(old_plan[0]) and self._is_unchanged(new_plan[0])
        sides = (self.old, self.new) if comparable else (self.new,)
        found = [estimate for side in sides if (estimate := _compare(side, key, sizes, old_plan, new_plan))]
        if found:
            exact = [estimate for estimate in found if estimate.basis == "measured"]
            return _mean(exact or found)
        default: Choice = (self.new.entries[key].operation.default_kernel, canonical_json({}))
        if not comparable or not self._is_unchanged(default[0]):
            return None
        before = _compare(self.old, key, sizes, old_plan, default)
        after = _compare(self.new, key, sizes, default, new_plan)
        return Estimate(before.log_ratio + after.log_ratio, "estimated") if before and after else None

    def _is_unchanged(self, kernel_id: str) -> bool:
        """Whether both sides measured one and the same kernel on one device, as far as they tell."""
        if self.old.device.matches(self.new.device) != "exact":
            return False
        sides = (self.old, self.new)
        sources = {side.sources[kernel_id] for side in sides if kernel_id in side.sources}
        # A table that does not use a kernel tells of its library by the others.
        libraries = {side.kernels[kernel_id]["library"] for side in sides if kernel_id in side.kernels}
        versions = {
            kernel["version"] for side in sides for kernel in side.kernels.values() if kernel["library"] in libraries
        }
        return len(sources) <= 1 and len(versions) <= 1

    def time_ns(self, key: EntryKey, sizes: Sizes, new_plan: Choice) -> float | None:
        """About how long the new plan takes, to weigh shapes by; None without measurements of it."""
        for side in (self.new, self.old):
            verdict = _nearest(side.verdicts.get(key, ()), sizes, lambda found: new_plan in found.standings)
            if verdict is not None:
                measured = verdict.reference_ns * math.exp(verdict.standings[new_plan].log_ratio)
                return measured * _work(side, key, verdict, sizes) / _work(side, key, verdict, verdict.sizes)
        return None


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    total = math.fsum(estimate.log_ratio for estimate in estimates)
    return Estimate(total / len(estimates), estimates[0].basis)


def _compare(side: Side, key: EntryKey, sizes: Sizes, slow: Choice, fast: Choice) -> Estimate | None:
    """log(time of `slow` / time of `fast`) as one side knows it."""
    if slow == fast:
        return Estimate(0.0, "measured")
    verdict = _nearest(
        side.verdicts.get(key, ()), sizes, lambda found: slow in found.standings and fast in found.standings
    )
    if verdict is not None:
        log_ratio = verdict.standings[slow].log_ratio - verdict.standings[fast].log_ratio
        return Estimate(log_ratio, "measured" if verdict.sizes == sizes else "estimated")
    known = _known_in_bucket(side, key, sizes)
    if slow in known and fast in known:
        return Estimate(known[slow] - known[fast], "estimated")
    return None


def _nearest(verdicts: Sequence[Verdict], sizes: Sizes, fits: Callable[[Verdict], bool]) -> Verdict | None:
    """The nearest verdict that fits, by the sum of log distances; none further away than `REACH` on an axis."""
    best: tuple[float, Sizes] | None = None
    nearest: Verdict | None = None
    for verdict in verdicts:
        gaps = [abs(math.log(a / b)) for a, b in zip(verdict.sizes, sizes, strict=True)]
        rank = (math.fsum(gaps), verdict.sizes)
        if max(gaps) <= math.log(REACH) + 1e-9 and (best is None or rank < best) and fits(verdict):
            best, nearest = rank, verdict
    return nearest


def _work(side: Side, key: EntryKey, verdict: Verdict, sizes: Sizes) -> float:
    operation = side.entries[key].operation
    return float(operation.flops(operation.with_sizes(verdict.context, sizes)))


def _known_in_bucket(side: Side, key: EntryKey, sizes: Sizes) -> dict[Choice, float]:
    """log times beside the bucket's own plan, as means over its points: of that plan, of the default and of the
    runner-up, where the evidence gives them."""
    entry = side.entries.get(key)
    leaf = MISS if entry is None else entry.decide(*sizes)
    if entry is None or leaf == MISS or not entry.buckets[leaf].chain:
        return {}
    bucket = entry.buckets[leaf]
    evidence = bucket.evidence or {}
    known: dict[Choice, float] = {}
    # The evidence names a runner-up by its kernel alone.
    if evidence.get("runner_up") is not None:
        known[(evidence["runner_up"], canonical_json({}))] = math.log1p(evidence["margin"])
    if evidence.get("speedup") is not None:
        known[(entry.operation.default_kernel, canonical_json({}))] = math.log(evidence["speedup"])
    known[bucket.chain[0].choice] = 0.0
    return known
