"""Limits over buckets: proved, split, or left as guards with the default behind them (contract 1)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernel import Kernel, KernelSpec
from layerzero_runtime.operations import operation_named
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.tables.table import MISS, Table
from layerzero_tune.compile.form import Entry
from layerzero_tune.compile.legality import legality
from layerzero_tune.results.measurement import Measurement, Status
from tests.tune.synthetic_kernels import BOUNDED, EVEN, KERNELS, SMALL_SCORES
from tests.tune.synthetic_results import (
    ALL_KERNELS,
    DEVICE,
    Times,
    compiled,
    cross,
    full,
    grid,
    measured,
    norm,
    served,
    table_of,
)

Context = SelectionContext


def with_winner(contexts: Sequence[Context], winner: str, default: float | Status = 1000.0) -> list[Measurement]:
    """Contests of the default and, wherever its limits allow it, a kernel at half the time."""
    limits = next(kernel.spec.limits for kernel in KERNELS if kernel.kernel_id == winner)

    def model(context: Context) -> Times:
        legal = all(limit.reject(context) is None for limit in limits)
        name = operation_named(context.operation).default_kernel
        loser = {"norm.rms": {"synthetic.lean": 5000.0}}.get(context.operation, {})
        return {name: default} | loser | ({winner: 500.0} if legal else {})

    return measured(contexts, model)


def only_entry(rows: Sequence[Measurement]) -> Entry:
    (entry,) = compiled(rows).entries
    return entry


def guards(entry: Entry) -> set[Limit]:
    return {guard for leaf in entry.leaves() for step in leaf.chain for guard in step.guards}


def test_a_range_limit_splits_the_bucket_that_it_runs_through() -> None:
    rows = with_winner(grid(norm, (1, 16), (512, 1024, 4096)), "synthetic.narrow")
    entry = only_entry(rows)
    assert [leaf.region.box[1] for leaf in entry.leaves()] == [(512, 2000), (2001, 4096)]
    assert guards(entry) == set()
    table = table_of(compiled(rows))
    assert [served(table, norm(8, size)) for size in (512, 1999, 2000, 2001, 4096)] == [
        "synthetic.narrow",
        "synthetic.narrow",
        "synthetic.narrow",
        "torch.rms_norm",
        "torch.rms_norm",
    ]


def test_the_key_length_of_equal_lengths_is_the_query_length() -> None:
    """`bounded` limits both lengths to 20 to 600; where it was measured it wins, so its bucket ends at the limits."""
    table = table_of(compiled(with_winner(grid(full, (8, 16), (16, 64, 512, 1024)), "synthetic.bounded")))
    found = [served(table, full(8, length)) for length in (19, 20, 600, 601, 724, 1024)]
    assert found == ["torch.sdpa", "synthetic.bounded", "synthetic.bounded", "torch.sdpa", "torch.sdpa", "torch.sdpa"]


@pytest.mark.parametrize(
    ("winner", "contexts", "legal", "refused"),
    [
        ("synthetic.even", grid(norm, (1, 16), (1024, 4096)), norm(4, 1280), norm(4, 1300)),
        ("synthetic.dense", grid(norm, (1, 16), (1024,)), norm(4), replace(norm(4), stride_last_dim=2)),
        ("synthetic.single", grid(full, (8, 16), (64,)), full(8, 64, 2), full(8, 64, 4)),
        ("synthetic.small_scores", grid(full, (1, 16), (64, 256)), full(16, 256), None),
    ],
)
def test_what_a_bucket_does_not_determine_is_a_guard_with_the_default_behind(
    winner: str, contexts: list[Context], legal: Context, refused: Context | None
) -> None:
    rows = with_winner(contexts, winner)
    table = table_of(compiled(rows))
    assert served(table, legal) == winner
    if refused is None:
        assert guards(only_entry(rows)) == set(), "the largest product of the bucket is within the limit"
    else:
        assert len(guards(only_entry(rows))) == 1
        assert served(table, refused) == operation_named(refused.operation).default_kernel


def test_a_product_that_a_bucket_exceeds_is_a_guard() -> None:
    """The winner's bucket reaches halfway to 2048 keys; 64 x 64 x 512 scores are more than the limit of 2**20."""
    table = table_of(compiled(with_winner(grid(cross, (32, 64), (32, 64), (128, 2048)), SMALL_SCORES.kernel_id)))
    assert served(table, cross(64, 64, 256)) == "synthetic.small_scores"
    assert served(table, cross(64, 64, 257)) == "torch.sdpa"
    assert served(table, cross(32, 64, 512)) == "synthetic.small_scores"
    assert served(table, cross(32, 64, 513)) == "torch.sdpa"


def test_lengths_that_are_tied_are_split_together() -> None:
    """Under a square mask the key length has no axis of its own."""

    def square(batch_kv_heads: int, length: int) -> Context:
        return replace(full(batch_kv_heads, length), operation="attention.causal")

    rows = with_winner(grid(square, (8, 16), (64, 512, 1024)), "synthetic.causal")
    boxes = [leaf.region.box for leaf in only_entry(rows).leaves()]
    assert boxes == [((8, 16), (64, 600), (64, 600)), ((8, 16), (601, 1024), (601, 1024))]
    table = table_of(compiled(rows))
    assert [served(table, square(8, length)) for length in (600, 601)] == ["synthetic.causal", "torch.sdpa"]


@pytest.mark.parametrize("status", ["failed", "out_of_memory", "wrong"])
def test_a_default_without_a_time_stands_behind_no_guard(status: Status) -> None:
    table = table_of(compiled(with_winner(grid(norm, (1, 16), (1024, 4096)), "synthetic.even", default=status)))
    assert served(table, norm(4, 1280)) == "synthetic.even"
    assert served(table, norm(4, 1300)) is None
    table = table_of(compiled(with_winner([norm(1, 512), norm(1, 1999)], "synthetic.narrow", default=status)))
    assert served(table, norm(1, 1000)) == "synthetic.narrow"


def test_a_default_that_was_never_measured_serves_nowhere() -> None:
    """Neither behind a guard, nor beyond `narrow`'s limit of 2000."""
    rows = [row for row in with_winner(grid(norm, (1, 16), (512, 4096)), "synthetic.even") if not row.is_default]
    assert served(table_of(compiled(rows)), norm(4, 1300)) is None
    rows = [row for row in with_winner(grid(norm, (1, 16), (1024, 4096)), "synthetic.narrow") if not row.is_default]
    table = table_of(compiled(rows))
    found = [served(table, norm(4, size)) for size in (2000, 2001, 2048, 2049)]
    assert found == ["synthetic.narrow", *["synthetic.lean"] * 3]


def test_a_default_that_failed_in_some_cells_of_a_bucket_stands_behind_none_of_its_guards() -> None:
    def model(context: Context) -> Times:
        assert context.rows is not None
        return {"torch.rms_norm": 1000.0 if context.rows < 16 else "out_of_memory", "synthetic.even": 500.0}

    table = table_of(compiled(measured(grid(norm, (1, 4, 16, 64), (1024, 2048)), model)))
    assert served(table, norm(8, 1280)) == "synthetic.even"
    assert served(table, norm(64, 1300)) is None


def test_a_winner_that_has_become_illegal_gives_way_to_the_default() -> None:
    """Measured under limits that were wider then."""

    def model(context: Context) -> Times:
        return {"torch.rms_norm": 1000.0, "synthetic.narrow": 500.0}

    table = table_of(compiled(measured(grid(norm, (1, 16), (2048, 4096)), model)))
    assert served(table, norm(4, 3000)) == "torch.rms_norm"


def test_a_limit_is_proved_where_the_bucket_has_one_size() -> None:
    operation, context = operation_named("norm.rms"), norm(1).with_device(DEVICE)
    assert legality(EVEN, operation, context, ((1, 64), (1024, 1024))).guards == ()
    refused = legality(EVEN, operation, context, ((1, 64), (1000, 1000)))
    assert refused.violated == Limit("hidden_size", "multiple_of", 128)
    assert legality(EVEN, operation, context, ((1, 64), (1000, 1024))).guards == (
        Limit("hidden_size", "multiple_of", 128),
    )


@pytest.mark.parametrize(
    ("lengths", "violated", "splits"),
    [
        ((20, 600), False, ()),
        ((1, 19), True, ()),
        ((601, 900), True, ()),
        ((10, 600), False, ((1, 19), (1, 19))),
        ((20, 700), False, ((1, 600), (1, 600))),
    ],
)
def test_ranges(lengths: tuple[int, int], violated: bool, splits: tuple[tuple[int, int], ...]) -> None:
    found = legality(BOUNDED, operation_named("attention.full"), full(1, 64).with_device(DEVICE), ((1, 64), lengths))
    assert (found.violated is not None) == violated
    assert found.splits == splits


def test_static_features_decide_once_and_for_all() -> None:
    operation = operation_named("norm.rms")
    context = replace(norm(1), dtype="float16", weight_dtype="float16").with_device(DEVICE)
    assert legality(EVEN, operation, context, ((1, 1), (1024, 1024))).violated == Limit(
        "dtype", "one_of", ("float32", "bfloat16")
    )


# On random calls, whatever a table gives is what the kernel's own limits allow.

_NORMS = grid(norm, (1, 8, 64), (128, 1024, 1999, 4096))
_FULL = [full(kv, length, batch) for kv, batch in ((4, 1), (16, 2), (64, 2)) for length in (16, 64, 512, 1024)]


def _table_with_all_winners(contexts: Sequence[Context], operation: str) -> Table:
    chance = random.Random(5)
    rivals = [kernel for kernel in KERNELS if operation in kernel.spec.operations]

    def model(context: Context) -> Times:
        legal = [k.kernel_id for k in rivals if all(limit.reject(context) is None for limit in k.spec.limits)]
        winner = chance.choice(legal)
        times = {operation_named(operation).default_kernel: 1000.0}
        return times | {kernel_id: 500.0 if kernel_id == winner else 1500.0 for kernel_id in legal}

    return table_of(compiled(measured(contexts, model)))


NORM_TABLE = _table_with_all_winners(_NORMS, "norm.rms")
FULL_TABLE = _table_with_all_winners(_FULL, "attention.full")


def check_legal(table: Table, context: Context) -> None:
    operation = operation_named(context.operation)
    described = context.with_device(DEVICE)
    entry, leaf = table.find(operation, described)
    if entry is None or leaf == MISS:
        return
    by_id = {kernel.kernel_id: kernel for kernel in ALL_KERNELS}
    for step in entry.leaves[leaf]:
        if step.accepts(described):
            assert [limit for limit in by_id[step.kernel_id].spec.limits if limit.reject(described)] == []
            return


@given(rows=st.integers(1, 70), hidden=st.integers(100, 4200), stride=st.sampled_from((1, 2)))
def test_no_hit_on_a_norm_is_illegal(rows: int, hidden: int, stride: int) -> None:
    check_legal(NORM_TABLE, replace(norm(rows, hidden), stride_last_dim=stride, is_contiguous=stride == 1))


@given(heads=st.integers(1, 16), batch=st.integers(1, 8), length=st.integers(1, 1100))
def test_no_hit_on_attention_is_illegal(heads: int, batch: int, length: int) -> None:
    check_legal(FULL_TABLE, full(heads * batch, length, batch))


@pytest.mark.parametrize(
    ("table", "fields"), [(NORM_TABLE, {"hidden_size", "stride_last_dim"}), (FULL_TABLE, {"batch_size"})]
)
def test_the_tables_of_random_calls_have_guards(table: Table, fields: set[str]) -> None:
    """Else the two tests above would show nothing."""
    (entry,) = (entry for entries in table.entries.values() for entry in entries.values())
    assert fields <= {guard.field for chain in entry.leaves for step in chain for guard in step.guards}


@pytest.mark.parametrize(("least", "is_legal"), [((8, 0), True), ((9, 0), True), ((10, 0), False)])
def test_what_the_device_of_the_table_fixes_needs_no_guard(least: tuple[int, int], is_legal: bool) -> None:
    """A guard on it would have every call described, and cost more than the kernel saves."""
    spec = KernelSpec(
        kernel_id="test.recent", operations=("norm.rms",), platforms=("cuda",), dtypes=("float32",), min_sm=least
    )
    kernel = Kernel(spec, KERNELS[0].load)
    context = norm(8).with_device(DeviceSpec("cuda", "NVIDIA H100 80GB HBM3", compute_capability=(9, 0)))
    found = legality(kernel, operation_named("norm.rms"), context, ((1, 64), (1024, 1024)))
    assert found.guards == ()
    assert (found.violated is None) == is_legal
