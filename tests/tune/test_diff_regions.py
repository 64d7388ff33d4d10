"""Regions: they name every size at which two entries differ, once, and no other; whatever the trees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.operations import operation_named
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.tables.table import MISS
from layerzero_tune.compile.form import Step
from layerzero_tune.diff.ranges import Ranges, complete, holds, sizes_inside
from layerzero_tune.diff.regions import Chain, Region, changed_regions
from layerzero_tune.diff.side import Bucket, EntryKey, SideEntry

NORM = operation_named("norm.rms")
KEY: EntryKey = ("norm.rms", ("eager", "float32", 0.0, ()))
EVEN = Limit("hidden_size", "multiple_of", 2)
CHAINS: tuple[Chain, ...] = (
    (),
    (Step(("a.a", "{}")),),
    (Step(("b.b", "{}")),),
    (Step(("b.b", "{}"), (EVEN,)), Step(("a.a", "{}"))),
    (Step(("b.b", "{}"), (EVEN,)),),
)
SIZES = range(1, 13)
PRODUCT = "rows * hidden_size"


@st.composite
def boxes(draw: st.DrawFn, box: Ranges, depth: int) -> list[Ranges]:
    """A box divided at random, along axes and their product, as a tree of comparisons divides it."""
    whole = complete(box, [PRODUCT])
    wide = [name for name, (low, high) in whole.items() if low < high]
    if not depth or not wide or not draw(st.booleans()):
        return [box]
    name = draw(st.sampled_from(wide))
    low, high = whole[name]
    edge = draw(st.integers(low, high - 1))
    halves = ({**box, name: (low, edge)}, {**box, name: (edge + 1, high)})
    return [part for half in halves for part in draw(boxes(half, depth - 1))]


def served(buckets: Sequence[Bucket], max_product: int | None, sizes: Sequence[int]) -> int:
    """What a generated decision function answers."""
    if max_product is not None and math.prod(sizes) > max_product:
        return MISS
    named = dict(zip(("rows", "hidden_size"), sizes, strict=True))
    for index, bucket in enumerate(buckets):
        if holds(bucket.ranges, named):
            return index if bucket.chain else MISS
    return MISS


@st.composite
def entries(draw: st.DrawFn) -> SideEntry:
    low, high = sorted(draw(st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES))))
    whole = {"rows": (low, high), "hidden_size": (1, draw(st.sampled_from(SIZES)))}
    buckets = tuple(Bucket(box, draw(st.sampled_from(CHAINS)), None) for box in draw(boxes(whole, 4)))
    max_product = draw(st.none() | st.integers(1, 60))
    return SideEntry(NORM, KEY[1], lambda *sizes: served(buckets, max_product, sizes), buckets, max_product)


def chain_at(entry: SideEntry, sizes: Sequence[int]) -> Chain | None:
    """The chain at these sizes; empty where they are in the range but were not measured, None outside."""
    if entry.max_product is not None and math.prod(sizes) > entry.max_product:
        return None
    for bucket in entry.buckets:
        if holds(bucket.ranges, dict(zip(("rows", "hidden_size"), sizes, strict=True))):
            return bucket.chain
    return None


@given(entries(), entries())
def test_every_size_that_differs_lies_in_one_region_and_no_other_does(old: SideEntry, new: SideEntry) -> None:
    regions = changed_regions(KEY, old, new)
    for sizes in itertools.product(SIZES, SIZES):
        before, after = chain_at(old, sizes), chain_at(new, sizes)
        if before is None or after is None:
            continue
        holding = [region for region in regions if region.holds({"rows": sizes[0], "hidden_size": sizes[1]})]
        assert [(region.old, region.new) for region in holding] == ([(before, after)] if before != after else [])


@given(entries(), entries())
def test_a_region_holds_sizes_that_both_serve(old: SideEntry, new: SideEntry) -> None:
    for region in changed_regions(KEY, old, new):
        inside = sizes_inside(region.ranges)
        if inside is not None and all(chain_at(entry, list(inside.values())) is not None for entry in (old, new)):
            assert chain_at(old, list(inside.values())) == region.old
            assert chain_at(new, list(inside.values())) == region.new


@given(entries(), entries())
def test_no_two_regions_with_one_change_could_be_one(old: SideEntry, new: SideEntry) -> None:
    for a, b in itertools.permutations(changed_regions(KEY, old, new), 2):
        if (a.old, a.new) == (b.old, b.new):
            one, other = (complete(region.ranges, [PRODUCT]) for region in (a, b))
            meeting = [name for name in one if one[name][1] + 1 == other[name][0]]
            others = [name for name in one if one[name] == other[name]]
            assert not (meeting and len(others) == len(one) - 1)


@given(entries())
def test_an_entry_does_not_differ_from_itself(entry: SideEntry) -> None:
    assert changed_regions(KEY, entry, entry) == ()


@given(entries(), st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES)))
def test_the_plan_of_a_side_obeys_guards_on_sizes(entry: SideEntry, sizes: tuple[int, int]) -> None:
    chain = chain_at(entry, sizes) or ()
    legal = [step.choice for step in chain if not step.guards or sizes[1] % 2 == 0]
    assert entry.plan(sizes) == (legal[0] if legal else None)


def test_another_guard_is_not_another_plan() -> None:
    guarded, plain = CHAINS[3], CHAINS[2]
    assert not Region(KEY, {}, guarded, plain).is_other_plan
    assert Region(KEY, {}, guarded, CHAINS[1]).is_other_plan
    assert Region(KEY, {}, guarded, ()).is_other_plan
