"""What the live selector picks where a table lost buckets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from layerzero_tune.measure.statistics import geometric_mean
from table_checks.condition import Condition

EFFICIENCY = 0.93
WITHOUT = "without_buckets"


def live_conditions(evaluation: Mapping[str, Any]) -> Iterator[Condition]:
    """Over the held-out shapes that the table serves and the tables without a share of its buckets do not, which
    scripts/removed_buckets.py made, and which were evaluated beside it."""
    thinned = [place for place, other in enumerate(evaluation["beside"]) if other["name"].startswith(WITHOUT)]
    picks = [shape["beside"][place] for shape in evaluation["shapes"] if shape["hit"] for place in thinned]
    lost = [pick["efficiency"] for pick in picks if not pick["hit"]]
    yield Condition.at_least("held-out shapes in removed buckets", len(lost), 1)
    if lost:
        print(
            f"live selector: {len(lost)} shapes in removed buckets of {len(thinned)} tables, the least {min(lost):.3f}"
        )
        yield Condition.at_least("live selector in removed buckets: efficiency", geometric_mean(lost), EFFICIENCY)
