"""Tables over cells that lie on no grid, as calls of real models do: many lines, few crossings measured."""

from __future__ import annotations

import random
from collections.abc import Iterator

from layerzero_runtime.context import SelectionContext
from layerzero_tune.compile.coverage import unmeasured_cells
from tests.tune.synthetic_results import Times, compiled, cross, full, measured, served, table_of


def _scattered(count: int, seed: int) -> Iterator[SelectionContext]:
    """Decodes and chunks over batches, heads and key lengths, evenly in log space."""
    chance = random.Random(seed)
    for _ in range(count):
        query = 1 if chance.random() < 0.5 else round(2.0 ** chance.uniform(6.0, 11.0))
        yield cross(round(2.0 ** chance.uniform(1.0, 9.0)), query, round(2.0 ** chance.uniform(6.0, 16.0)))


def _heads(context: SelectionContext) -> int:
    return context.num_heads or 0


def test_lines_close_together_make_no_more_holes() -> None:
    cells = [(1, 1), (1, 256), (256, 1)]
    beside = [(rows, 1) for rows in range(256, 330, 2)] + [(1, length) for length in range(256, 330, 2)]
    assert len(unmeasured_cells([*cells, *beside], (0, 1), None)) <= 2 * len(unmeasured_cells(cells, (0, 1), None))


def test_a_gain_is_not_drowned_by_the_crossings_that_nobody_measured() -> None:
    """The lines of a hundred cells on three axes cross at tens of thousands of places."""

    def gains(context: SelectionContext) -> bool:
        return context.seq_len_q == 1 and 2**12 < _heads(context) * (context.seq_len_k or 0) < 2**17

    def model(context: SelectionContext) -> Times:
        return {"torch.sdpa": 1000.0, "synthetic.fused": 900.0 if gains(context) else 1200.0}

    table = table_of(compiled(measured(_scattered(100, 0), model)))
    found = [served(table, context) for context in _scattered(400, 1) if gains(context)]
    hits = [kernel for kernel in found if kernel is not None]
    assert len(hits) > 0.8 * len(found) > 40
    assert hits.count("synthetic.fused") > 0.85 * len(hits)


def test_a_kernel_for_small_batches_is_not_expected_to_take_large_ones() -> None:
    """`single` takes two sequences at most, and the batch is no axis; where it is fastest, `fused` does not get beyond
    the screening. What is fastest for the many calls that have more serves them."""

    def model(context: SelectionContext) -> Times:
        times: Times = {"torch.sdpa": 1000.0, "synthetic.fused": 700.0}
        return {**times, "synthetic.single": 500.0} if context.batch_size == 1 else times

    def calls(count: int, heads: tuple[float, float], lengths: tuple[float, float]) -> Iterator[SelectionContext]:
        for number in range(count):
            batch = 1 if number % 6 == 0 else 8
            yield full(batch * round(2.0 ** chance.uniform(*heads)), round(2.0 ** chance.uniform(*lengths)), batch)

    chance = random.Random(0)
    table = table_of(compiled(measured(calls(48, (0.0, 5.0), (5.0, 12.0)), model, screen=1.25)))
    found = [served(table, call) for call in calls(300, (1.0, 4.0), (6.0, 11.0)) if call.batch_size == 8]
    assert found.count("synthetic.fused") > 0.95 * len(found)
