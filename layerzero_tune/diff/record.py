"""A `Comparison` as JSON values: everything, where the text for people lists the largest changes alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from layerzero_tune.diff.comparison import Comparison, CoverageChange, RegionChange
from layerzero_tune.diff.ranges import Ranges
from layerzero_tune.diff.regions import Chain, Region
from layerzero_tune.diff.side import EntryKey, Side
from layerzero_tune.diff.summary import summarise


def record_of(comparison: Comparison) -> Mapping[str, Any]:
    """Speeds are the old plan's time over the new one's: above 1 the new one is faster."""
    return {
        "old": _side(comparison.old),
        "new": _side(comparison.new),
        "same_device": comparison.is_same_device,
        "static_keys": {
            "added": [_key(key) for key in comparison.added],
            "removed": [_key(key) for key in comparison.removed],
            "changed": [_key(key) for key in comparison.changed],
            "unchanged": comparison.unchanged,
        },
        "summaries": [asdict(summary) for summary in summarise(comparison.shapes)],
        "changes": [_change(change) for change in comparison.regions],
        "coverage": [_coverage(change) for change in comparison.coverage],
        "kernels": [asdict(change) for change in comparison.kernels],
    }


def _side(side: Side) -> Mapping[str, Any]:
    return {
        "path": str(side.path),
        "device": side.device.to_dict(),
        "provenance": dict(side.provenance),
        "static_keys": len(side.entries),
        "contests": side.contests,
        "disturbed_contests": side.disturbed,
        "buckets": sum(len(entry.buckets) for entry in side.entries.values()),
    }


def _key(key: EntryKey) -> Mapping[str, Any]:
    operation, (mode, dtype, *features) = key
    return {"operation": operation, "mode": mode, "dtype": dtype, "features": features}


def _change(change: RegionChange) -> Mapping[str, Any]:
    return {
        **_region(change.region),
        "effect": change.effect,
        "shapes": change.shapes,
        "weight": change.weight,
        "speed": None if change.log_gain is None else math.exp(change.log_gain),
    }


def _region(region: Region) -> Mapping[str, Any]:
    return {
        "key": _key(region.key),
        "ranges": dict(region.ranges),
        "old": _chain(region.old),
        "new": _chain(region.new),
    }


def _chain(chain: Chain) -> list[Mapping[str, Any]]:
    return [
        {
            "kernel_id": step.choice[0],
            "configuration": json.loads(step.choice[1]),
            "guards": [{"field": guard.field, "kind": guard.kind, "bound": guard.bound} for guard in step.guards],
        }
        for step in chain
    ]


def _coverage(change: CoverageChange) -> Mapping[str, Any]:
    def covered(ranges: Ranges | None, max_product: int | None) -> Mapping[str, Any] | None:
        return None if ranges is None else {"ranges": dict(ranges), "max_product": max_product}

    return {
        "key": _key(change.key),
        "old": covered(change.old, change.old_product),
        "new": covered(change.new, change.new_product),
        "gained": change.gained,
        "lost": change.lost,
        "regions": [_region(region) for region in change.regions],
    }
