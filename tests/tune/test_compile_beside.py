"""Keys that differ in a graded feature alone, as the GQA group: what is measured under one tells of those near it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.cell import key_of
from layerzero_tune.compile.judge import judge
from layerzero_tune.compile.pipeline import compile_rows
from layerzero_tune.compile.pooling import beside, neighbours
from layerzero_tune.compile.witnesses import witnesses
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.search.agenda import Agenda
from layerzero_tune.search.key_regret import KeyRegret
from layerzero_tune.search.recorded_device import RecordedDevice
from layerzero_tune.workload.lines import WorkloadLine
from tests.tune.synthetic_results import ALL_KERNELS, Times, compiled, grid, measured, norm, served, table_of

DEFAULT, FUSED, BOUNDED = "torch.sdpa", "synthetic.fused", "synthetic.bounded"
FAST: Times = {DEFAULT: 2000.0, FUSED: 1000.0}
CORNERS = [(1, 64), (64, 64), (1, 4096), (64, 4096)]
BETWEEN = [(4, 256), (4, 1024), (16, 256), (16, 1024)]


def grouped(group: int, sizes: Sequence[tuple[int, int]] = CORNERS) -> list[SelectionContext]:
    """Calls of heads of keys and lengths, with so many query heads to each head of keys."""
    return [
        SelectionContext(
            operation="attention.full",
            dtype="float32",
            batch_size=1,
            num_heads=heads * group,
            num_kv_heads=heads,
            head_dim=64,
            seq_len_q=length,
        )
        for heads, length in sizes
    ]


def rows_of(contexts: Sequence[SelectionContext], times: Times = FAST) -> list[Measurement]:
    return measured(contexts, lambda _: times)


@pytest.mark.parametrize(("neighbour", "kernel_id"), [(8, FUSED), (2, FUSED), (16, None)])
def test_corners_are_served_between_where_a_near_group_was_measured(neighbour: int, kernel_id: str | None) -> None:
    """Corners alone vouch for nothing between them, nor does a group that is two octaves away."""
    rows = rows_of(grouped(4)) + rows_of(grouped(neighbour, [*CORNERS, *BETWEEN]))
    table = table_of(compiled(rows))
    (call,) = grouped(4, [(8, 500)])
    assert served(table, call) == kernel_id


def test_a_table_serves_nothing_beyond_the_range_of_its_own_key() -> None:
    table = table_of(compiled(rows_of(grouped(4, BETWEEN)) + rows_of(grouped(8, [*CORNERS, *BETWEEN]))))
    inside, beyond = grouped(4, [(8, 500), (32, 500)])
    assert (served(table, inside), served(table, beyond)) == (FUSED, None)


def test_a_key_that_was_not_measured_is_not_served() -> None:
    table = table_of(compiled(rows_of(grouped(4))))
    assert [served(table, call) for call in grouped(8)] == [None] * len(CORNERS)


def test_a_kernel_that_was_not_checked_under_a_key_does_not_serve_it() -> None:
    theirs: Times = {DEFAULT: 2000.0, FUSED: 1000.0, BOUNDED: 500.0}
    models = compile_rows(rows_of(grouped(4)) + rows_of(grouped(8, BETWEEN), theirs), ALL_KERNELS).models
    (model,) = (model for (_, static_key), model in models.items() if 4 in static_key)
    assert (BOUNDED, "{}") not in model.choices
    assert not model.beside  # all hangs on the kernel that was not checked


def test_what_is_best_beside_alone_may_serve() -> None:
    """Under the own key it was measured, but is best nowhere."""
    ours: Times = {DEFAULT: 2000.0, BOUNDED: 1000.0, FUSED: 1500.0}
    theirs: Times = {DEFAULT: 2000.0, BOUNDED: 1900.0, FUSED: 500.0}
    own = [(heads, length) for heads, length in CORNERS if length < 600] + [(1, 600), (64, 600)]
    between = [(4, 128), (4, 512), (16, 128), (16, 512)]
    table = table_of(compiled(rows_of(grouped(4, own), ours) + rows_of(grouped(8, between), theirs)))
    assert [served(table, call) for call in grouped(4, between)] == [FUSED] * len(between)


def test_own_cells_outweigh_those_beside() -> None:
    slow: Times = {DEFAULT: 1000.0, FUSED: 3000.0}
    table = table_of(compiled(rows_of(grouped(4, [*CORNERS, *BETWEEN]), slow) + rows_of(grouped(8, BETWEEN))))
    assert [served(table, call) for call in grouped(4, BETWEEN)] == [DEFAULT] * len(BETWEEN)


def test_each_size_has_one_witness_the_nearest() -> None:
    rows = [row for group in (2, 4, 5, 8) for row in rows_of(grouped(group, [*CORNERS, *BETWEEN][: 3 + group]))]
    key = key_of(grouped(4)[0])
    model = compile_rows(rows, ALL_KERNELS).models[key]
    found = witnesses(model, ((1, 64), (64, 4096)))
    assert [verdict.sizes for verdict in found] == sorted({verdict.sizes for verdict in found})
    own = {verdict.sizes for verdict in model.verdicts}
    assert {verdict.sizes for verdict in found if not verdict.away} == own
    assert {round(verdict.away, 3) for verdict in found if verdict.away} == {0.322}  # of group 5
    assert {verdict.sizes for verdict in witnesses(model, ((1, 4), (64, 4096)))} == own | {(4, 256)}


def test_what_is_told_is_of_calls_of_the_own_group() -> None:
    """Guards are asked of it: a kernel for one group does not count as turned away beside."""
    rows = rows_of(grouped(4)) + rows_of(grouped(8, BETWEEN))
    verdicts = judge(rows)
    key = key_of(grouped(4)[0])
    told = beside(verdicts, "cpu")[key]
    assert {key_of(verdict.context) for verdict in told} == {key}
    assert [verdict.sizes for verdict in told] == [verdict.sizes for verdict in verdicts[key_of(grouped(8)[0])]]


@pytest.mark.parametrize(("platform", "found"), [("cuda", 1), ("cpu", 0)])
def test_a_group_that_was_measured_in_the_other_type_tells_where_both_share_verdicts(platform: str, found: int) -> None:
    own, other = (key_of(replace(grouped(group)[0], dtype=dtype)) for group, dtype in ((4, "bfloat16"), (8, "float16")))
    assert neighbours([own, other], platform)[own] == [(1.0, other)] * found
    same = key_of(replace(grouped(8)[0], dtype="bfloat16"))
    assert neighbours([own, other, same], platform)[own] == [(1.0, same)]


@pytest.mark.parametrize("make", [lambda: grouped(1), lambda: grid(norm, (1, 64), (512, 4096))])
def test_operations_without_a_graded_feature_and_single_keys_have_nothing_beside(
    make: Callable[[], list[SelectionContext]],
) -> None:
    contexts = make()
    default = DEFAULT if contexts[0].operation == "attention.full" else "torch.rms_norm"
    rows = measured(contexts, lambda _: {default: 1000.0})
    rows += measured([replace(context, dtype="bfloat16") for context in contexts], lambda _: {default: 1000.0})
    assert set(beside(judge(rows), "cpu").values()) == {()}


def test_a_run_expects_less_to_be_lost_where_a_near_group_was_measured() -> None:
    """Four corners of one group are held; of another one those and what lies between, or nothing."""

    far = [(8, 512)]  # from all corners

    def expected(other: Sequence[SelectionContext]) -> float:
        held = rows_of([*grouped(4), *other])
        device = RecordedDevice([*held, *rows_of(grouped(4, far))])
        wanted = [*grouped(4, [*CORNERS, *far]), *other]
        contests = {context: device.contests(context) for context in wanted}
        done = {row.contest_id: [each for each in held if each.contest_id == row.contest_id] for row in held}
        agenda = Agenda(device, [WorkloadLine(context) for context in wanted], contests, done, refine=False)
        return agenda.expected_regret()[1]

    assert expected([]) > 0.5  # a table would give the default
    assert expected(grouped(16, [*CORNERS, *BETWEEN])) > 0.5
    assert expected(grouped(8, [*CORNERS, *BETWEEN])) < 0.1


def test_what_is_left_does_not_depend_on_the_order_in_which_both_groups_came_in() -> None:
    def left(own_first: bool) -> float:
        operation = operation_named("attention.full")
        (first, second) = (KeyRegret(operation, (0, 1), {(8, 512): 1.0, (4, 250): 1.0}) for _ in range(2))
        first.heed([(1.0, second)])
        slower: Times = {DEFAULT: 2000.0, FUSED: 1950.0}
        contests = [(first, grouped(4), FAST), (second, grouped(8, [*CORNERS, *BETWEEN]), slower)]
        for regret, calls, times in contests if own_first else reversed(contests):
            for call in calls:
                regret.learn(operation.sizes(call), rows_of([call], times))
                regret.renew()
        first.renew()
        return first.weighted[0]

    assert left(own_first=True) == left(own_first=False)
