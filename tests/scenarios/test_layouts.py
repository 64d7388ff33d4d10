"""NO-032 to NO-035: dense layouts, the ragged one, and the way from one to another. DESIGN.md keeps torch's and
flash-attn's real conventions: SDPA takes BHSD, flash-attn BSHD."""

from __future__ import annotations

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime.errors import ContextError, NoKernelAvailableError
from layerzero_runtime.selection.transforms import Transform
from tests.scenarios.conftest import (
    FULL_KERNELS,
    Attend,
    assert_near,
    attention,
    beside_builtin,
    by_each_kernel,
    cpu_kernel,
    exact_attention,
    kernel,
    only,
    qkv,
    reasons,
)

pytestmark = pytest.mark.usefixtures("without_tables")

TO_BHSD, TO_BSHD = Transform("transpose", "bhsd", copies=False), Transform("transpose", "bshd", copies=False)
DENSE = Transform("contiguous", "", copies=True)


@pytest.mark.parametrize(
    ("layout", "other"),
    [
        pytest.param("bshd", "bhsd", marks=pytest.mark.scenario("NO-032")),
        pytest.param("bhsd", "bshd", marks=pytest.mark.scenario("NO-033")),
    ],
)
def test_of_equal_kernels_that_want_dense_tensors_the_one_of_the_calls_layout_wins(layout: str, other: str) -> None:
    """The other one comes first by its id."""
    native = kernel("mine.native", layouts=(layout,), requires_contiguous=True)
    with only(native, kernel("a.other", layouts=(other,), requires_contiguous=True)):
        plan = lz.select(attention(layout=layout))
        assert (plan.kernel_id, plan.pre_transforms, plan.post_transforms) == ("mine.native", (), ())
        assert lz.select(attention(layout=other)).kernel_id == "a.other"


@pytest.mark.scenario("NO-032")
@pytest.mark.scenario("NO-033")
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_every_builtin_kernel_gives_right_values_in_the_layout_of_the_call(layout: str) -> None:
    query, key, value = qkv(2, 4, 8, 16, kv_heads=2)
    exact = exact_attention(query, key, value)
    if layout == "bshd":
        query, key, value = (part.transpose(1, 2).contiguous() for part in (query, key, value))
        exact = exact.transpose(1, 2)
    results = by_each_kernel("attention.full", lambda: lz.attention(query, key, value, enable_gqa=True, layout=layout))
    assert results.keys() == FULL_KERNELS | {"torch.sdpa.flash_cpu_folded"}
    for result in results.values():
        assert_near(result, exact)


@pytest.mark.scenario("NO-032")
@pytest.mark.scenario("NO-033")
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_a_kernel_of_the_calls_layout_gets_the_calls_own_tensors(layout: str) -> None:
    attend = Attend(layout=layout)
    query, key, value = qkv(2, 4, 8, 16)
    with beside_builtin(cpu_kernel("mine.native", attend, layouts=(layout,))):
        lz.attention(query, key, value, layout=layout)
    [given] = attend.given
    assert all(part is own for part, own in zip(given, (query, key, value), strict=True))


@pytest.mark.scenario("NO-034")
def test_a_ragged_batch_goes_to_a_ragged_kernel_and_to_no_dense_one() -> None:
    ragged = kernel("flashinfer.ragged", layouts=("nhd",))
    context = attention(layout="nhd")
    with beside_builtin(ragged, kernel("flash_attn.fa2", priority=300, layouts=("bshd",))):
        plan = lz.select(context)
        assert (plan.kernel_id, plan.pre_transforms) == ("flashinfer.ragged", ())
        for dense in ("flash_attn.fa2", "torch.sdpa"):
            assert "LAYOUT_NOT_ONE_OF: layout is 'nhd', required one of 'b" in reasons(context, dense)
        # And the other way round.
        assert lz.select(attention()).kernel_id == "flash_attn.fa2"
        assert reasons(attention(), "flashinfer.ragged") == "LAYOUT_NOT_ONE_OF: layout is 'bhsd', required 'nhd'"
    with pytest.raises(NoKernelAvailableError, match="layout is 'nhd'"):
        lz.select(context)


@pytest.mark.scenario("NO-034")
def test_a_kernel_of_both_kinds_takes_both_as_they_are() -> None:
    with only(kernel("flashinfer.both", layouts=("nhd", "bshd"))):
        for layout in ("nhd", "bshd"):
            plan = lz.select(attention(layout=layout))
            assert (plan.kernel_id, plan.pre_transforms, plan.post_transforms) == ("flashinfer.both", (), ())


@pytest.mark.scenario("NO-034")
def test_four_dimensions_cannot_be_called_ragged() -> None:
    with pytest.raises(ContextError, match="layout is 'nhd', allowed: bhsd, bshd"):
        lz.attention(*qkv(), layout="nhd")


@pytest.mark.scenario("NO-035")
def test_the_plan_names_the_transpose_there_and_back() -> None:
    with only(kernel("mine.bhsd", layouts=("bhsd",))):
        plan = lz.select(attention(layout="bshd"))
        assert (plan.pre_transforms, plan.post_transforms) == ((TO_BHSD,), (TO_BSHD,))
        assert "before it: transpose bhsd (a view)" in str(lz.explain(attention(layout="bshd")))
    with only(kernel("mine.dense_bhsd", layouts=("bhsd",), requires_contiguous=True)):
        plan = lz.select(attention(layout="bshd"))
        assert (plan.pre_transforms, plan.post_transforms) == ((TO_BHSD, DENSE), (TO_BSHD,))


@pytest.mark.scenario("NO-035")
@pytest.mark.parametrize("needs_dense", [False, True])
def test_a_bshd_call_reaches_a_bhsd_kernel_and_comes_back_right(needs_dense: bool) -> None:
    attend = Attend()
    query, key, value = qkv(2, 4, 8, 16)
    swapped = [part.transpose(1, 2).contiguous() for part in (query, key, value)]
    with only(cpu_kernel("mine.bhsd", attend, layouts=("bhsd",), requires_contiguous=needs_dense)):
        for _ in range(2):
            output = lz.attention(swapped[0], swapped[1], swapped[2], layout="bshd")
            assert_near(output, exact_attention(query, key, value).transpose(1, 2))
    for given in attend.given:
        for part, expected, own in zip(given, (query, key, value), swapped, strict=True):
            assert torch.equal(part, expected)
            assert part.is_contiguous() == needs_dense
            # The transpose alone is a view of the caller's memory.
            assert (part.data_ptr() == own.data_ptr()) != needs_dense


@pytest.mark.scenario("NO-035")
@pytest.mark.parametrize(
    ("hint", "kernel_id"), [(10.0, "mine.native"), (2.0, "mine.dense_bhsd"), (0.0, "mine.dense_bhsd")]
)
def test_the_copy_that_a_kernel_needs_counts_against_its_priority(hint: float, kernel_id: str) -> None:
    needs_copy = kernel(
        "mine.dense_bhsd", layouts=("bhsd",), requires_contiguous=True, priority=55, transform_cost_hint=hint
    )
    with only(needs_copy, kernel("mine.native", layouts=("bshd",), priority=50)):
        assert lz.select(attention(layout="bshd")).kernel_id == kernel_id
        # Where it needs none, its priority is whole.
        assert lz.select(attention(layout="bhsd")).kernel_id == "mine.dense_bhsd"
