"""What a comparison says of two tables whose times are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_tune.compile.judge import Choice
from layerzero_tune.diff.comparison import Comparison, Effect, compare
from layerzero_tune.diff.prediction import REACH, Basis, Estimate, Predictor
from layerzero_tune.diff.shapes import Shape, measured_shapes, shapes_of_workload
from layerzero_tune.diff.side import EntryKey, Side
from layerzero_tune.diff.summary import SpeedSummary, summarise
from layerzero_tune.workload.lines import WorkloadLine
from tests.tune.diff_sides import (
    DEFAULT,
    FUSED,
    OTHER_DEVICE,
    ROWS,
    VECTOR,
    SideMaker,
    results_side,
    rows_with,
    table_side,
)
from tests.tune.synthetic_kernels import EVEN
from tests.tune.synthetic_results import ALL_KERNELS, Times, full, grid, measured, norm

KEY: EntryKey = ("norm.rms", ("eager", "float32", 0.0, ()))
PLAIN: Choice = (DEFAULT, "{}")
FAST: Choice = (FUSED, "{}")
EITHER_SIDE = pytest.mark.parametrize("side", [results_side, table_side])
LOG_2 = math.log(2)


def compared(old: Side, new: Side) -> Comparison:
    return compare(old, new, measured_shapes((old, new)))


def overall(comparison: Comparison) -> SpeedSummary:
    return summarise(comparison.shapes)[-1]


def check(estimate: Estimate | None, log_ratio: float, basis: Basis) -> None:
    assert estimate is not None
    assert estimate.log_ratio == pytest.approx(log_ratio, rel=1e-6)
    assert estimate.basis == basis


def effects(comparison: Comparison) -> list[tuple[Effect, int, float | None]]:
    """(effect, shapes, speed) of the changed regions, from few rows to many."""
    found = sorted(comparison.regions, key=lambda change: change.region.ranges["rows"])
    return [(change.effect, change.shapes, change.log_gain and round(math.exp(change.log_gain), 4)) for change in found]


@EITHER_SIDE
def test_equal_sides_differ_in_nothing(side: SideMaker, tmp_path: Path) -> None:
    found = compared(*(side(tmp_path / name, rows_with(500, 500, 2000)) for name in "ab"))
    assert (found.added, found.removed, found.changed, found.unchanged) == ((), (), (), 1)
    assert (found.regions, found.coverage, found.kernels) == ((), (), ())
    part, whole = summarise(found.shapes)
    assert (part.operation, part.mode) == ("norm.rms", "eager")
    assert (whole.shapes, whole.other_plan, whole.speed, whole.missing) == (3, 0, 1.0, 0)


def test_a_kernel_that_has_changed_is_judged_by_the_new_measurements_alone(tmp_path: Path) -> None:
    """At 8 rows fused was twice as fast as the default; now that its code has changed it is four times as slow."""
    old = results_side(tmp_path / "old", rows_with(500, 500, 2000))
    new = results_side(tmp_path / "new", rows_with(500, 4000, 2000, source_hash="another"))
    found = compared(old, new)
    assert found.changed == (KEY,)
    assert effects(found) == [("faster", 1, 4.0)]
    whole = overall(found)
    assert (whole.measured, whole.estimated, whole.unknown) == (1, 0, 0)
    assert whole.speed == pytest.approx(4 ** (1 / 3), rel=1e-6)
    assert whole.worst == 1.0
    assert whole.best == pytest.approx(4.0, rel=1e-6)
    # In ns: 500, 1000 and 1000 now; by the same measurements the old plans take 500, 4000 and 1000.
    assert whole.total_time == pytest.approx(2500 / 5500, rel=0.02), "each contest has its own drift"


def test_of_an_unchanged_kernel_both_sides_count_alike_and_swapping_them_inverts_the_speed(tmp_path: Path) -> None:
    """At 8 rows fused was twice as fast, now four times as slow: together it is the root of two slower."""
    old = results_side(tmp_path / "old", rows_with(500, 500, 2000))
    new = results_side(tmp_path / "new", rows_with(500, 4000, 2000))
    there, back = compared(old, new), compared(new, old)
    (gain,) = (change.gain for change in there.shapes if change.old != change.new)
    check(gain, LOG_2 / 2, "measured")
    assert (overall(there).speed or 0.0) * (overall(back).speed or 0.0) == pytest.approx(1.0)
    assert effects(back) == [("slower", 1, round(1 / math.sqrt(2), 4))]


def test_another_version_of_the_library_counts_as_another_kernel_even_where_one_table_uses_it_alone(
    tmp_path: Path,
) -> None:
    """The new table never picks fused, so that it says nothing of it but that torch has changed."""
    old = results_side(tmp_path / "old", rows_with(500, 500, 500))
    new = results_side(tmp_path / "new", rows_with(2000, 2000, 2000, versions={"torch": "2.14.0"}))
    assert FUSED not in new.kernels
    assert effects(compared(old, new)) == [("faster", 3, 2.0)]


def test_on_another_device_the_new_measurements_alone_count(tmp_path: Path) -> None:
    old = results_side(tmp_path / "old", rows_with(500, 500, 500))
    new = results_side(tmp_path / "new", rows_with(2000, 2000, 2000, device=OTHER_DEVICE.to_dict()))
    found = compared(old, new)
    assert not found.is_same_device
    assert effects(found) == [("faster", 3, 2.0)]
    # What the new side did not measure is unknown: nothing is taken from the other device.
    unmeasured = results_side(tmp_path / "vector", rows_with(600, 600, 600, vector=400, device=OTHER_DEVICE.to_dict()))
    vector = results_side(tmp_path / "old_vector", rows_with(600, 600, 600, vector=300))
    assert compared(vector, unmeasured).regions == ()
    plain = results_side(tmp_path / "plain", rows_with(500, 500, 500, device=OTHER_DEVICE.to_dict()))
    assert effects(compared(vector, plain)) == [("unknown", 3, None)]


def test_plans_that_never_met_in_a_contest_are_compared_through_the_default(tmp_path: Path) -> None:
    """The old side knows vector (4x the default's speed), the new one does not, and has fused (2x)."""
    old = results_side(tmp_path / "old", [row for row in rows_with(9, 9, 9, vector=250) if row.kernel_id != FUSED])
    new = results_side(tmp_path / "new", rows_with(500, 500, 500))
    found = compared(old, new)
    assert effects(found) == [("slower", 3, 0.5)]
    assert (overall(found).measured, overall(found).estimated) == (0, 3)


def test_between_measured_shapes_the_nearest_counts_within_its_reach(tmp_path: Path) -> None:
    """Fused is 4x as fast as the default at 1 row and 2x at 10; both lie in one bucket, which ends at 25 rows."""
    side = results_side(tmp_path, rows_with(250, 500, 4000, rows=(1, 10, 160)))

    def at(rows: int) -> Estimate | None:
        return Predictor(side, side).log_ratio(KEY, (rows, 1024), PLAIN, FAST)

    check(at(10), LOG_2, "measured")
    check(at(9), LOG_2, "estimated")
    check(at(2), 2 * LOG_2, "estimated")
    check(at(round(10 * REACH)), LOG_2, "estimated")
    check(at(159), -2 * LOG_2, "estimated")


def test_a_table_without_its_results_predicts_by_the_evidence_of_its_buckets(tmp_path: Path) -> None:
    """Runner-up and default are known for each bucket as means over its points."""
    old = table_side(tmp_path / "old", rows_with(500, 500, 500, vector=800))
    new = table_side(tmp_path / "new", rows_with(2000, 2000, 2000, vector=800))
    assert (old.verdicts, new.verdicts) == ({}, {})
    found = compared(old, new)
    # Old: fused takes 500, its runner-up vector 800. New: vector takes 800, its runner-up is the default.
    assert effects(found) == [("slower", 3, round(500 / 800, 4))]
    whole = overall(found)
    assert (whole.measured, whole.estimated, whole.total_time) == (0, 3, None)


def test_shapes_count_by_their_weights(tmp_path: Path) -> None:
    old = results_side(tmp_path / "old", rows_with(500, 500, 2000))
    new = results_side(tmp_path / "new", rows_with(500, 4000, 2000, source_hash="another"))
    lines = [WorkloadLine(norm(8), 3.0), WorkloadLine(norm(1), 1.0), WorkloadLine(norm(65), 7.0)]
    found = compare(old, new, shapes_of_workload(lines))
    whole = overall(found)
    assert (whole.shapes, whole.missing, whole.gained, whole.lost) == (3, 1, 0, 0)
    assert whole.speed == pytest.approx(4 ** (3 / 4), rel=1e-6)
    assert whole.total_time == pytest.approx((500 + 3 * 1000) / (500 + 3 * 4000), rel=0.02)
    assert [(change.shapes, change.weight) for change in found.regions] == [(1, 3.0)]


def test_a_region_weighs_its_shapes_as_the_workload_does(tmp_path: Path) -> None:
    """Fused was twice as fast everywhere; with other code it takes 2, 8 and 4 times the default's time."""
    old = results_side(tmp_path / "old", rows_with(500, 500, 500))
    new = results_side(tmp_path / "new", rows_with(2000, 8000, 4000, source_hash="another"))
    lines = [WorkloadLine(norm(8), 5.0), WorkloadLine(norm(1), 1.0)]
    (change,) = compare(old, new, shapes_of_workload(lines)).regions
    assert (change.shapes, change.weight) == (2, 6.0)
    assert change.log_gain == pytest.approx((5 * 3 + 1) / 6 * LOG_2, rel=1e-6)


def test_a_change_that_touches_no_shape_is_estimated_in_the_middle_of_its_sizes(tmp_path: Path) -> None:
    old = results_side(tmp_path / "old", rows_with(500, 500, 500, 500, rows=(1, 16, 256, 4096)))
    new = results_side(
        tmp_path / "new", rows_with(2000, 8000, 4000, 3000, rows=(1, 16, 256, 4096), source_hash="another")
    )
    (change,) = compare(old, new, []).regions
    assert (change.effect, change.shapes, change.weight) == ("no shape", 0, 0.0)
    # The middle of 1 to 4096 rows is 64; as near to 16 as to 256, it goes with the smaller one.
    assert change.log_gain == pytest.approx(3 * LOG_2, rel=1e-6)


def test_where_one_side_measured_the_very_shape_the_neighbours_of_the_other_do_not_count(tmp_path: Path) -> None:
    old = results_side(tmp_path / "old", rows_with(500, 500, rows=(1, 16)))
    new = results_side(tmp_path / "new", rows_with(4000, 4000, 4000, rows=(1, 8, 16)))
    check(Predictor(old, new).log_ratio(KEY, (8, 1024), FAST, PLAIN), 2 * LOG_2, "measured")
    check(Predictor(old, new).log_ratio(KEY, (16, 1024), FAST, PLAIN), LOG_2 / 2, "measured")
    check(Predictor(old, new).log_ratio(KEY, (9, 1024), FAST, PLAIN), LOG_2 / 2, "estimated")


def test_lines_that_a_table_cannot_tell_apart_are_one_shape() -> None:
    lines = [WorkloadLine(full(8, 64, batch_size), 1.5) for batch_size in (1, 2, 4)]
    assert [(shape.sizes, shape.weight) for shape in shapes_of_workload(lines)] == [((8, 64), 4.5)]


@EITHER_SIDE
def test_a_smaller_range_loses_the_shapes_outside_it(side: SideMaker, tmp_path: Path) -> None:
    old = side(tmp_path / "old", rows_with(500, 500, 500))
    new = side(tmp_path / "new", rows_with(500, 500, rows=(1, 8)))
    found = compared(old, new)
    (change,) = found.coverage
    assert (change.key, change.gained, change.lost, change.regions) == (KEY, 0, 1, ())
    assert change.old == {"rows": (1, 64), "hidden_size": (1024, 1024)}
    assert change.new == {"rows": (1, 8), "hidden_size": (1024, 1024)}
    assert found.changed == (KEY,)
    assert (overall(found).lost, overall(found).shapes, overall(found).speed) == (1, 3, 1.0)
    (back,) = compared(new, old).coverage
    assert (back.gained, back.lost) == (1, 0)


def corner(context: SelectionContext) -> Times:
    return {DEFAULT: 1000.0}


def test_another_largest_product_is_another_coverage(tmp_path: Path) -> None:
    contexts = grid(norm, (1, 8, 64), (512, 1024))
    most = [context for context in contexts if (context.rows or 0) * (context.hidden_size or 0) < 64 * 1024]
    old = results_side(tmp_path / "old", measured(contexts, corner))
    new = results_side(tmp_path / "new", measured(most, corner))
    (change,) = compared(old, new).coverage
    assert change.old == change.new
    assert (change.old_product, change.new_product) == (None, 64 * 512)
    assert (change.gained, change.lost) == (0, 1)


def test_a_hole_inside_the_range_is_a_region_of_lost_coverage(tmp_path: Path) -> None:
    """Where the middle of a grid was not measured, the table misses."""
    lines = ((1, 16, 256), (64, 1024, 16384))
    contexts = grid(norm, *lines)
    holed = [context for context in contexts if (context.rows, context.hidden_size) != (16, 1024)]
    old = results_side(tmp_path / "old", measured(contexts, corner))
    new = results_side(tmp_path / "new", measured(holed, corner))
    (change,) = compared(old, new).coverage
    assert change.old == change.new
    assert change.lost == 1
    assert all(region.old and not region.new for region in change.regions)
    assert sum(region.holds({"rows": 16, "hidden_size": 1024}) for region in change.regions) == 1
    assert not any(region.holds({"rows": 1, "hidden_size": 64}) for region in change.regions)


def test_static_keys_of_one_side_alone_are_added_or_removed_with_their_shapes(tmp_path: Path) -> None:
    one = rows_with(500, 500, 500)
    both = [*one, *measured([replace(norm(rows), dtype="bfloat16") for rows in ROWS], corner)]
    old, new = results_side(tmp_path / "old", one), results_side(tmp_path / "new", both)
    found = compared(old, new)
    assert [key[1][1] for key in found.added] == ["bfloat16"]
    assert (found.removed, found.unchanged, overall(found).gained) == ((), 1, 3)
    (change,) = found.coverage
    assert (change.old, change.gained, change.lost) == (None, 3, 0)
    back = compared(new, old)
    assert (len(back.removed), back.added, overall(back).lost) == (1, (), 3)


def test_kernels_gained_and_lost_are_those_of_plans_with_the_shapes_that_they_serve(tmp_path: Path) -> None:
    old = results_side(tmp_path / "old", rows_with(500, 500, 2000, vector=900))
    new = results_side(tmp_path / "new", rows_with(2000, 2000, 2000, vector=700))
    served = {change.kernel_id: (change.old_shapes, change.new_shapes) for change in compared(old, new).kernels}
    assert served == {FUSED: (2, 0), VECTOR: (1, 3)}
    kernels: Mapping[str, object] = {change.kernel_id: change.new for change in compared(old, new).kernels}
    assert kernels[FUSED] is None


def test_another_limit_of_a_kernel_is_the_same_plan_under_other_conditions(tmp_path: Path) -> None:
    def model(context: SelectionContext) -> Times:
        return {DEFAULT: 1000.0, EVEN.kernel_id: 500.0}

    rows = measured(grid(norm, (1, 8), (128, 1024)), model)
    unlimited = replace(EVEN, spec=replace(EVEN.spec, hidden_size_multiple=1))
    others = [kernel for kernel in ALL_KERNELS if kernel is not EVEN]
    old, new = table_side(tmp_path / "old", rows), table_side(tmp_path / "new", rows, [*others, unlimited])
    found = compared(old, new)
    assert [(change.effect, change.shapes) for change in found.regions] == [("guards", 4)]
    assert overall(found).other_plan == 0
    # Between the multiples the plan is another one, as calls there get it.
    between = compare(old, new, [Shape(KEY, (4, 1000))])
    (change,) = between.shapes
    assert (change.old, change.new) == (PLAIN, (EVEN.kernel_id, "{}"))


def test_a_difference_below_what_a_contest_repeats_is_none(tmp_path: Path) -> None:
    old = results_side(tmp_path / "old", rows_with(980, 980, 980, vector=981))
    new = results_side(tmp_path / "new", rows_with(985, 985, 985, vector=978))
    assert {change.effect for change in compared(old, new).regions} == {"equal"}
