"""The quality of generated functions over times with a known optimum, judged between the measured sizes.

Points are those of the standard preset for one static key (30 to 70), times have 3% of noise per round.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.operation import Sizes
from layerzero_runtime.operations import operation_named
from layerzero_runtime.selection.limits import rejections
from layerzero_runtime.tables.table import MISS, Table
from layerzero_tune.compile.feature import feature_name
from layerzero_tune.compile.judge import judge
from layerzero_tune.compile.region import Region
from tests.tune.recordings import BOTH_DTYPES, recorded_rows
from tests.tune.synthetic_landscapes import Landscape, beyond, corners, landscapes, preset_points
from tests.tune.synthetic_results import ALL_KERNELS, DEVICE, compiled, measured, norm, served, table_of
from tests.tune.trees import edges

NOISE = 0.03
# At some of these a crossing lies just below a measured line, on which the gain is real but too small to be proved.
SHIFTS = (1.0, 1.2, 1.4, 1.7)
LANDSCAPES = {(found.name, shift): found for shift in SHIFTS for found in landscapes(shift)}
CORNERS = {(found.name, shift): found for shift in SHIFTS for found in corners(shift)}


@cache
def table_over(name: str, shift: float, seed: int) -> Table:
    landscape = (LANDSCAPES | CORNERS)[name, shift]
    return table_of(compiled(measured(landscape.points, landscape.times, NOISE, repeat=seed)))


def regrets(table: Table, landscape: Landscape) -> list[float]:
    """Log regret of the table at sizes between the measured ones; infinite where it misses."""
    axes = len(operation_named(landscape.points[0].operation).axes_of(landscape.points[0]))
    found = []
    for context in landscape.dense({2: 40, 3: 13}[axes]):
        times = landscape.times(context)
        found.append(math.log(times.get(served(table, context) or "", math.inf) / min(times.values())))
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "shift"), LANDSCAPES)
def test_between_the_measured_sizes_a_table_is_within_half_a_percent_of_the_best(
    name: str, shift: float, seed: int
) -> None:
    found = regrets(table_over(name, shift, seed), LANDSCAPES[name, shift])
    assert len(found) > 1000
    assert math.fsum(found) / len(found) <= math.log(1.005)
    assert max(found) <= math.log(1.05)


@pytest.mark.parametrize(("axes", "mean", "worst"), [("two", 1.012, 1.32), ("three", 1.045, 1.8)])
def test_in_corners_of_regions_a_table_leaves_out_what_their_surroundings_do_not_bear_out(
    axes: str, mean: float, worst: float
) -> None:
    """The bend at a corner is seen only where something was measured: there gains are left to the default."""
    for name, shift in CORNERS:
        if name == f"corner of {axes} axes":
            found = regrets(table_over(name, shift, 0), CORNERS[name, shift])
            assert math.fsum(found) / len(found) <= math.log(mean)
            assert max(found) <= math.log(worst)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("crossing", [9, 25, 60, 100, 230, 600])
def test_an_edge_lies_within_ten_percent_of_a_steep_crossing(crossing: int, seed: int) -> None:
    def model(context: SelectionContext) -> dict[str, float]:
        return {"torch.rms_norm": 1e6, "synthetic.lean": 1e6 * beyond(crossing, context.rows, slope=0.3)}

    (entry,) = compiled(measured(preset_points(norm(1)), model, NOISE, repeat=seed)).entries
    found = edges(entry.tree)
    assert found
    for feature, edge in found:
        if feature_name(feature, entry.axes) == "rows":
            assert abs(math.log((edge + 0.5) / crossing)) <= math.log(1.1)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("slope", [0.02, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("crossing", [20, 100, 300])
def test_where_times_hardly_change_the_regret_is_a_percent_beside_what_the_intervals_leave_open(
    crossing: int, slope: float, seed: int
) -> None:
    def shares(context: SelectionContext) -> dict[str, float]:
        return {"synthetic.lean": beyond(crossing, context.rows, slope)}

    gentle = Landscape("gentle", norm, preset_points(norm(1)), shares)
    rows = measured(gentle.points, gentle.times, NOISE, repeat=seed)
    (verdicts,) = judge(rows).values()
    half = max((standing.high - standing.low) / 2 for verdict in verdicts for standing in verdict.standings.values())
    found = regrets(table_of(compiled(rows)), gentle)
    assert max(found) <= math.log(1.01) + half


def test_no_hit_of_a_hundred_thousand_random_calls_is_illegal() -> None:
    """Sizes within and beyond what was measured, heads split in any way, strides that some kernels refuse."""
    chance = random.Random(7)
    limits = {kernel.kernel_id: kernel.spec.limits for kernel in ALL_KERNELS}
    tables = [(LANDSCAPES[key], table_over(*key, 0)) for key in LANDSCAPES if key[1] == SHIFTS[0]]
    hits = guarded = 0
    for index in range(100_000):
        landscape, table = tables[index % len(tables)]
        context = _random_call(landscape, chance)
        kernel_id = served(table, context)
        if kernel_id is not None:
            hits += 1
            guarded += bool(rejections(limits["synthetic.even"], context.with_device(DEVICE)))
            assert not rejections(limits[kernel_id], context.with_device(DEVICE))
    assert hits > 50_000
    assert guarded > 10_000


def _random_call(landscape: Landscape, chance: random.Random) -> SelectionContext:
    operation = operation_named(landscape.points[0].operation)
    measured_sizes = [operation.sizes(point) for point in landscape.points]
    free = [operation.axes.index(axis) for axis in operation.axes_of(landscape.points[0])]
    while True:
        sizes = [
            round(2 ** chance.uniform(math.log2(min(line)) - 0.2, math.log2(max(line)) + 0.2))
            for axis, line in enumerate(zip(*measured_sizes, strict=True))
            if axis in free
        ]
        if any(size < 1 for size in sizes):
            continue
        context = landscape.make(*sizes)
        if context.batch_kv_heads is not None:
            heads = chance.choice([n for n in (1, 2, 3, 4, 8) if context.batch_kv_heads % n == 0])
            context = replace(context, batch_size=context.batch_kv_heads // heads, num_heads=heads, num_kv_heads=heads)
        elif chance.random() < 0.1:
            context = replace(context, stride_last_dim=2, is_contiguous=False)
        try:
            operation.validate(context)
        except ContextError:
            continue
        return context


def _some_sizes(region: Region) -> Iterator[Sizes]:
    lines = [sorted({round(low * (high / low) ** (step / 8)) for step in range(9)}) for low, high in region.box]
    for free in product(*(lines[axis] for axis in region.free)):
        sizes = tuple(free[region.free.index(axis)] if axis in region.free else free[-1] for axis in range(len(lines)))
        if region.holds(sizes):
            yield sizes


def test_every_key_and_every_bucket_is_reached_by_a_call() -> None:
    """Over all operations of the quick preset: the key that the runtime builds for a call finds the entry."""
    rows = recorded_rows(BOTH_DTYPES)
    form = compiled(rows)
    table = table_of(form)
    assert len(form.entries) > 20
    contexts = {
        (row.context.operation, operation_named(row.context.operation).static_key(row.context)): row.context
        for row in rows
    }
    for entry in form.entries:
        operation = operation_named(entry.operation)
        reached = set()
        for leaf in entry.leaves():
            for sizes in _some_sizes(leaf.region):
                context = operation.with_sizes(contexts[entry.operation, entry.static_key], sizes)
                if operation.static_key(context) == entry.static_key and operation.misfit(context) is None:
                    found, number = table.find(operation, context.with_device(DEVICE))
                    assert found is not None
                    reached.add(number)
        served_leaves = {index for index, leaf in enumerate(entry.leaves()) if leaf.chain}
        assert served_leaves <= reached - {MISS}, f"{entry.operation} {entry.static_key}"
