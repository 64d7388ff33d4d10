"""Features generalise over models: batch x kv heads serves other head counts as well as batch and heads apart do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from layerzero_runtime.context import SelectionContext
from layerzero_tune.compile.judge import Choice, Verdict, judge
from layerzero_tune.compile.local_plane import local_planes
from layerzero_tune.compile.regret import REACH
from layerzero_tune.results.store import ResultsStore

TABLES = Path(__file__).parents[2] / "tables"
# Key/value heads of the CPU presets' models; the committed results' random probes have others.
TUNED_HEADS = (8, 12)

Features = Callable[[SelectionContext], tuple[int, ...]]


def product(context: SelectionContext) -> tuple[int, ...]:
    return (context.batch_kv_heads or 0, context.seq_len_q or 0, context.seq_len_k or 0)


def raw(context: SelectionContext) -> tuple[int, ...]:
    return (context.batch_size or 0, context.num_kv_heads or 0, context.seq_len_q or 0, context.seq_len_k or 0)


def expected_best(tuned: Sequence[Verdict], at: Verdict, features: Features) -> Choice:
    """The choice that is fastest by a plane over these features through the tuned cells nearby."""
    found = {at.default: 0.0}
    for choice in at.standings.keys() - {at.default}:
        cells = [
            (
                tuple(math.log2(a / b) for a, b in zip(features(cell.context), features(at.context), strict=True)),
                cell.standings[choice].log_ratio,
            )
            for cell in tuned
            if choice in cell.standings
        ]
        if not cells:
            continue
        offsets = [np.array(line)[:, None] for line in zip(*(offset for offset, _ in cells), strict=True)]
        distances = np.sqrt(np.sum([offset**2 for offset in offsets], axis=0))
        reach = max(math.log2(REACH) * math.sqrt(3), 1.5 * distances.min())
        weights = np.maximum(1.0 - distances / reach, 0.0)
        total = weights.sum(axis=0)
        heights, _ = local_planes(
            weights / total[:, None], offsets, np.array([[ratio] for _, ratio in cells]), 0.1 / total
        )
        found[choice] = float(heights[0])
    return min(found, key=lambda choice: (found[choice], choice))


def test_other_head_counts_are_served_as_well_by_the_product_as_by_raw_shapes() -> None:
    regrets: dict[Features, list[float]] = {product: [], raw: []}
    for results in sorted(TABLES.glob("cpu_*/results")):
        for (operation, _), verdicts in judge(ResultsStore(results).read().rows).items():
            if not operation.startswith("attention."):
                continue
            tuned = [verdict for verdict in verdicts if verdict.context.num_kv_heads in TUNED_HEADS]
            for verdict in verdicts:
                if verdict.context.num_kv_heads not in TUNED_HEADS:
                    for features, found in regrets.items():
                        found.append(verdict.regret(expected_best(tuned, verdict, features)))
    assert len(regrets[product]) > 200
    efficiency = {features: math.exp(-math.fsum(found) / len(found)) for features, found in regrets.items()}
    assert efficiency[product] >= efficiency[raw]
    assert efficiency[product] >= 0.98
