"""Balances of waves: what they say of a call, and tables that split by them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import TableError
from layerzero_tune.compile.emit import emit, leaf_at
from layerzero_tune.compile.feature import features_over
from layerzero_tune.compile.form import Leaf, Split, Step, TableForm
from layerzero_tune.compile.region import Region
from layerzero_tune.compile.self_check import check_emitted
from layerzero_tune.compile.wave_balance import EVEN, LEAST, MOST, WaveBalance, parse_balance
from layerzero_tune.diff.ranges import Ranges, common, complete, concise, holds
from layerzero_tune.diff.reading import read_sides
from layerzero_tune.diff.regions import changed_regions
from tests.tune.synthetic_results import compiled, contest_rows
from tests.tune.test_compile_waves import DEFAULT, GPU, OTHER, call, waves
from tests.tune.trees import edges

AXES = ("batch_kv_heads", "seq_len_q")
BALANCE = WaveBalance(count=0, rows=1, each=1, multiprocessors=132)
COUNTS, LENGTHS = st.integers(1, 100_000), st.integers(1, 200_000)


@pytest.mark.parametrize(
    ("heads", "length", "expected"),
    [
        (1, 1, MOST),  # a tile of either height, of which the taller one has more rows to work off
        (132, 128, MOST),
        (12, 1500, 768),  # 96 tiles of 192 rows in a wave, 144 of 128 in two
        (20, 1500, MOST),  # in two waves both
        (24, 1500, EVEN),  # in two and in three
        (40, 1500, 1152),  # in three and in four
    ],
)
def test_the_rows_that_a_multiprocessor_works_off_in_tall_tiles_beside_short_ones(
    heads: int, length: int, expected: int
) -> None:
    assert BALANCE.of((heads, length)) == expected


@given(
    COUNTS,
    LENGTHS,
    st.integers(1, 16),
    st.integers(1, 200),
    st.integers(-2, 2) | st.integers(LEAST - MOST, MOST - LEAST),
)
def test_a_condition_of_a_table_says_what_the_balance_is(
    heads: int, length: int, each: int, multiprocessors: int, beside: int
) -> None:
    balance = WaveBalance(0, 1, each, multiprocessors)
    found = balance.of((heads, length))
    named = balance.named(AXES)
    sizes = dict(zip(AXES, (heads, length), strict=True))
    assert LEAST <= found <= MOST
    assert named.of(sizes) == found
    assert balance.of_all(np.array([[heads, length], [1, 1]])).tolist() == [found, MOST]
    least, most = balance.span({0: (heads, heads + beside % 5), 1: (max(1, length - beside % 7), length)})
    assert LEAST <= least <= found <= most <= MOST
    assert eval(named.condition(found + beside), sizes) == (beside >= 0)
    assert parse_balance(str(named)) == named


@pytest.mark.parametrize(
    "text", ["rows", "rows * hidden_size", "wave_balance(a, b)", "wave_balance(a * b, c, 132)", "wave_balance(a, b, 0)"]
)
def test_other_names_are_no_balance(text: str) -> None:
    assert parse_balance(text) is None


def test_the_balance_is_of_all_heads() -> None:
    context, _ = call(3, 512, group=4)
    assert waves().balance(context) == replace(BALANCE, each=4)
    assert str(waves().balance(context).named(AXES)) == "wave_balance(4 * batch_kv_heads, seq_len_q, 132)"


def test_a_region_keeps_the_range_of_a_balance_beside_its_box() -> None:
    whole = Region(((1, 64), (128, 4096)), (0, 1))
    low, high = whole.divided(BALANCE, 1100)
    assert low.box == high.box == whole.box
    assert low.beside == ((BALANCE, (LEAST, 1100)),)
    few, _ = whole.divided((0,), 2)
    assert few.divided(BALANCE, 1500)[0].is_empty  # a wave of either tiles, at most
    assert high.beside == ((BALANCE, (1101, MOST)),)
    assert low.holds((24, 1500))
    assert not high.holds((24, 1500))
    assert low.divided(BALANCE, 1100)[1].is_empty
    narrow, _ = low.divided((0, 1), 2048)
    assert [feature for feature, _ in narrow.beside] == [(0, 1), BALANCE]


def test_balances_are_split_by_where_calls_have_waves() -> None:
    assert features_over((0, 1), None) == ((0,), (1,), (0, 1))
    assert features_over((0, 1), BALANCE) == ((0,), (1,), (0, 1), BALANCE)


def ratio(heads: int, length: int) -> float:
    """Of a kernel with tiles of 192 rows, each of which takes 1.3 times as long as the default's of 128."""
    short, tall = (-(-heads * -(-length // rows) // 132) for rows in (128, 192))
    return 1.3 * tall / short


MEASURED = [(heads, length) for heads in range(12, 100, 3) for length in (512, 1024, 1500)]
UNSEEN = [(heads, length) for heads in range(12, 97) for length in (700, 1024, 1400)]


@cache
def table(limit: float = 1.0, device: DeviceSpec = GPU) -> TableForm:
    """The default's time times `limit`."""
    rows = []
    for heads, length in MEASURED:
        context, _ = call(heads, length)
        times = {DEFAULT[0]: 1e6 * limit, OTHER[0]: 1e6 * ratio(heads, length)}
        rows += [replace(row, device=device.to_dict()) for row in contest_rows(context, times, noise=0.002)]
    return compiled(rows)


def wrong_share(form: TableForm) -> float:
    (entry,) = form.entries
    served = [(ratio(*sizes), leaf_at(entry.tree, sizes).chain[0].choice) for sizes in UNSEEN if entry.covers(sizes)]
    return sum((found < 1.0) != (choice == OTHER) for found, choice in served) / len(served)


def test_kernels_whose_tiles_differ_in_height_part_by_the_balance() -> None:
    (entry,) = table().entries
    assert BALANCE in [feature for feature, _ in edges(entry.tree)]
    of_unknown_width = table(device=replace(GPU, multiprocessors=None))
    assert BALANCE not in [feature for feature, _ in edges(of_unknown_width.entries[0].tree)]
    assert wrong_share(table()) < 0.5 * wrong_share(of_unknown_width)


@pytest.mark.parametrize("moved", [1080, 1160])
def test_a_moved_edge_over_a_balance_is_named_where_nothing_was_measured(moved: int, tmp_path: Path) -> None:
    (entry,) = table().entries
    low, high = Region(entry.bounds, entry.free).divided(BALANCE, 1100)
    tree = Split(BALANCE, 1100, Leaf(low, (Step(OTHER),), None), Leaf(high, (Step(DEFAULT),), None))
    form = replace(table(), entries=(replace(entry, tree=tree),))
    folder = emit(form).write(tmp_path)
    assert check_emitted(form, folder) > 0
    with pytest.raises(TableError, match=r"attention\.full"):
        check_emitted(replace(form, entries=(replace(entry, tree=replace(tree, edge=moved)),)), folder)


def test_a_comparison_says_where_the_balance_makes_a_difference(tmp_path: Path) -> None:
    sides = [read_sides(emit(table(limit)).write(tmp_path / str(limit)), {}) for limit in (1.0, 1.6)]
    (old,), (new,) = sides
    ((key, before),), ((_, after),) = (side.entries.items() for side in (old, new))
    regions = changed_regions(key, before, after)
    assert any("wave_balance(batch_kv_heads, seq_len_q, 132)" in region.ranges for region in regions)
    for heads, length in MEASURED:
        found = [region for region in regions if region.holds(dict(zip(AXES, (heads, length), strict=True)))]
        differs = before.plan((heads, length)) != after.plan((heads, length))
        assert len(found) == differs


def test_ranges_of_balances_are_said_where_they_are_not_all() -> None:
    name = str(BALANCE.named(AXES))
    low: Ranges = {"batch_kv_heads": (1, 64), "seq_len_q": (1, 4096), name: (LEAST, 1000)}
    high: Ranges = {**low, name: (1001, MOST)}
    assert common(low, high) is None
    assert common(low, {**low, name: (900, MOST)}) == {**low, name: (900, 1000)}
    whole = complete({"batch_kv_heads": (1, 64), "seq_len_q": (1, 4096)}, [name])
    assert whole[name] == (LEAST, MOST)
    assert name not in concise(whole)
    assert concise(low) == low
    assert holds(low, {"batch_kv_heads": 12, "seq_len_q": 1500})
    assert not holds(low, {"batch_kv_heads": 20, "seq_len_q": 1500})
