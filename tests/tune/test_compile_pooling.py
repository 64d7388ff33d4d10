"""Types that decide nothing beside each other: what was measured in one counts in the other, on a GPU alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operations import operation_named
from layerzero_runtime.twin_types import TWINS, twin_of
from layerzero_tune.compile.emit import leaf_at
from layerzero_tune.compile.form import TableForm
from layerzero_tune.compile.judge import judge
from layerzero_tune.compile.pipeline import compile_rows
from layerzero_tune.compile.pooling import pool_of, pooled, pooled_cell
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.search.agenda import Agenda
from layerzero_tune.search.configurations.searched import Searched
from layerzero_tune.search.key_regret import KeyRegret
from layerzero_tune.search.recorded_device import RecordedDevice
from layerzero_tune.workload.lines import WorkloadLine
from tests.tune.described_gpus import H100
from tests.tune.synthetic_results import DEVICE, Times, grid, measured, norm

DEFAULT, OWN, OTHER = "torch.rms_norm", "triton.rms_norm", "liger.rms_norm"
FAST: Times = {DEFAULT: 2000.0, OWN: 1000.0}
ROWS = (1, 16, 256, 4096)
WIDTHS = (512, 4096)


def typed(contexts: Iterable[SelectionContext], dtype: str) -> list[SelectionContext]:
    return [
        SelectionContext(
            operation="norm.rms", dtype=dtype, mode="graph", rows=context.rows, hidden_size=context.hidden_size
        )
        for context in contexts
    ]


def rows_on(device: DeviceSpec, dtype: str, points: Sequence[SelectionContext], times: Times) -> list[Measurement]:
    return [replace(row, device=device.to_dict()) for row in measured(typed(points, dtype), lambda _: times)]


def served(form: TableForm, dtype: str, rows: int, width: int) -> str | None:
    (context,) = typed([norm(rows, width)], dtype)
    operation = operation_named("norm.rms")
    (entry,) = (entry for entry in form.entries if entry.static_key == operation.static_key(context))
    sizes = operation.sizes(context)
    chain = leaf_at(entry.tree, sizes).chain if entry.covers(sizes) else ()
    return chain[0].choice[0] if chain else None


CORNERS = grid(norm, (ROWS[0], ROWS[-1]), WIDTHS)
BETWEEN = grid(norm, ROWS[1:-1], (1024, 2048))


@pytest.mark.parametrize(("device", "kernel_id"), [(H100, OWN), (DEVICE, None)])
def test_a_type_is_served_where_the_other_one_was_measured_on_a_gpu(device: DeviceSpec, kernel_id: str | None) -> None:
    """Corners alone vouch for nothing between them."""
    rows = rows_on(device, "bfloat16", CORNERS, FAST) + rows_on(device, "float16", BETWEEN, FAST)
    if device is DEVICE:  # whose platform our own kernel does not have
        rows = [replace(row, kernel_id="torch.rms_norm.fused") if row.kernel_id == OWN else row for row in rows]
    form = compile_rows(rows, builtin_kernels()).form
    assert served(form, "bfloat16", 64, 1500) == kernel_id


def test_the_range_is_that_of_both() -> None:
    rows = rows_on(H100, "bfloat16", BETWEEN, FAST) + rows_on(H100, "float16", CORNERS, FAST)
    form = compile_rows(rows, builtin_kernels()).form
    assert served(form, "bfloat16", ROWS[-1], WIDTHS[-1]) == OWN
    assert served(form, "bfloat16", ROWS[-1] + 1, WIDTHS[-1]) is None


def test_a_type_that_was_not_measured_at_all_is_not_served() -> None:
    form = compile_rows(rows_on(H100, "bfloat16", CORNERS, FAST), builtin_kernels()).form
    assert [entry.static_key[1] for entry in form.entries] == ["bfloat16"]


def test_a_kernel_that_was_not_checked_in_a_type_does_not_serve_it() -> None:
    ours: Times = {DEFAULT: 2000.0, OWN: 1500.0}
    theirs: Times = {DEFAULT: 2000.0, OWN: 1500.0, OTHER: 500.0}
    rows = rows_on(H100, "bfloat16", CORNERS, ours) + rows_on(H100, "float16", [*CORNERS, *BETWEEN], theirs)
    models = compile_rows(rows, builtin_kernels()).models
    for (_, static_key), model in models.items():
        assert ((OTHER, "{}") in model.choices) == (static_key[1] == "float16")
        assert len(model.verdicts) == (len(CORNERS) if static_key[1] == "bfloat16" else len([*CORNERS, *BETWEEN]))
    slower: Times = {**theirs, OTHER: 1900.0}  # where nothing hangs on it, the others count
    rows = rows_on(H100, "bfloat16", CORNERS, ours) + rows_on(H100, "float16", BETWEEN, slower)
    for (_, static_key), model in compile_rows(rows, builtin_kernels()).models.items():
        assert ((OTHER, "{}") in model.choices) == (static_key[1] == "float16")
        assert len(model.verdicts) == len([*CORNERS, *BETWEEN])


def test_at_equal_sizes_a_type_goes_by_its_own_contests() -> None:
    slow: Times = {DEFAULT: 1000.0, OWN: 3000.0}
    rows = rows_on(H100, "bfloat16", CORNERS, FAST) + rows_on(H100, "float16", CORNERS, slow)
    found = pooled(judge(rows), "cuda")
    assert found == judge(rows)


def test_what_is_borrowed_is_a_call_of_the_own_type() -> None:
    rows = rows_on(H100, "bfloat16", CORNERS, FAST) + rows_on(H100, "float16", BETWEEN, FAST)
    for (_, static_key), verdicts in pooled(judge(rows), "cuda").items():
        assert {verdict.context.dtype for verdict in verdicts} == {static_key[1]}
        assert all(operation_named("norm.rms").static_key(verdict.context) == static_key for verdict in verdicts)


@pytest.mark.parametrize("dtype", TWINS)
def test_both_types_have_one_pool_on_a_gpu_and_each_its_own_on_a_cpu(dtype: str) -> None:
    key = ("norm.rms", operation_named("norm.rms").static_key(typed([norm(1)], dtype)[0]))
    twin = twin_of(key[1], "cuda")
    assert twin is not None
    assert pool_of(key, "cuda") == pool_of(("norm.rms", twin), "cuda")
    assert pool_of(key, "cpu") == key
    single = ("norm.rms", operation_named("norm.rms").static_key(norm(1)))
    assert pool_of(single, "cuda") == single


def agenda_over(points: Sequence[SelectionContext]) -> tuple[RecordedDevice, Agenda]:
    rows = [replace(row, device=H100.to_dict()) for row in measured(points, lambda _: FAST, noise=0.001)]
    device = RecordedDevice(rows)
    contests = {context: device.contests(context) for context in points}
    return device, Agenda(device, [WorkloadLine(context) for context in points], contests, {}, refine=False)


def test_a_run_measures_each_type_and_reaches_the_bounds_of_both_together() -> None:
    """Corners of one type, and before all else that is left a point of the other, which has none of them."""
    points = typed(CORNERS, "bfloat16") + typed(BETWEEN, "float16")
    device, agenda = agenda_over(points)
    taken: list[SelectionContext] = []
    while {context.dtype for context in taken} != {"bfloat16", "float16"}:
        planned = agenda.next()
        assert planned is not None
        taken.append(planned.contest.context)
        agenda.learn(planned, device.measure(planned.contest)[0])
    assert len(taken) <= len(CORNERS)
    corners = [context for context in taken if context.dtype == "bfloat16"]
    assert {context.rows for context in corners} == {ROWS[0], ROWS[-1]}
    assert {context.hidden_size for context in corners} == set(WIDTHS)


def test_a_type_is_measured_early_where_all_that_it_asks_for_is_known_of_the_other() -> None:
    points = [*typed(grid(norm, ROWS, (512, 1024, 2048, 4096)), "bfloat16"), *typed([norm(4000, 4000)], "float16")]
    device, agenda = agenda_over(points)
    order: list[str] = []
    while (planned := agenda.next()) is not None:
        order.append(planned.contest.context.dtype)
        agenda.learn(planned, device.measure(planned.contest)[0])
    assert order.index("float16") < 5


def test_contests_of_both_types_at_equal_sizes_say_together_what_is_best() -> None:
    operation = operation_named("norm.rms")
    regret = KeyRegret(operation, (0, 1), {(64, 1024): 1.0})
    points = [norm(64, 1024)]
    regret.learn((64, 1024), rows_on(H100, "bfloat16", points, FAST))
    regret.learn((64, 1024), rows_on(H100, "float16", points, {**FAST, OTHER: 500.0}))
    regret.renew()
    assert regret.served((64, 1024)) == (OTHER, "{}")


def test_equal_sizes_of_both_types_are_one_cell_of_a_run() -> None:
    points = [*typed(CORNERS, "bfloat16"), *typed(CORNERS, "float16")]
    device, agenda = agenda_over(points)
    order = []
    while (planned := agenda.next()) is not None:
        order.append(pooled_cell(planned.contest.context, "cuda"))
        agenda.learn(planned, device.measure(planned.contest)[0])
    assert len(order) == len(points)
    assert len(set(order)) == len(CORNERS)
    mean, _ = agenda.expected_regret()
    assert mean < 0.005


def test_what_a_search_found_in_one_type_is_proposed_in_the_other_on_a_gpu() -> None:
    bfloat, half = (typed([norm(64)], dtype)[0] for dtype in ("bfloat16", "float16"))
    searching = [
        replace(row, policy={**row.policy, "rounds": 0}) for row in rows_on(H100, "bfloat16", [norm(64)], FAST)
    ]
    assert all(row.is_search for row in searching)
    assert Searched(searching, "cuda").around(OWN, half) == [(0.0, [searching[1]])]
    assert Searched(searching, "cpu").around(OWN, half) == []
    assert Searched(searching, "cuda").around(OWN, bfloat) == []
