"""Limits, specs and the registry: what a declaration means, and which declarations are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import LayerZeroError, NoKernelAvailableError, SpecError
from layerzero_runtime.kernel import Kernel, KernelSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.policies.policy import Policy
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.limits import Limit, rejections
from layerzero_runtime.selection.live_selector import LiveSelector, no_kernel_error
from layerzero_runtime.tables.prior import Prior

CPU = DeviceSpec("cpu", "Some CPU")


def spec(**changes: Any) -> KernelSpec:
    usual = {
        "kernel_id": "test.kernel",
        "operations": ("attention.causal", "attention.full"),
        "platforms": ("cpu",),
        "dtypes": ("float32",),
        "requires": (),
    }
    return KernelSpec(**{**usual, **changes})


def kernel(**changes: Any) -> Kernel:
    return Kernel(spec(**changes), lambda context, configuration: lambda *arguments: None)


def attention(operation: str = "attention.causal", **changes: Any) -> SelectionContext:
    sizes = {"batch_size": 2, "seq_len_q": 8, "num_heads": 4, "head_dim": 64, "device": CPU}
    return SelectionContext(operation=operation, **{"dtype": "float32", **sizes, **changes})


@pytest.mark.parametrize(
    ("limit", "actual", "accepted"),
    [
        (Limit("head_dim", "at_least", 64), 64, True),
        (Limit("head_dim", "at_least", 64), 63, False),
        (Limit("head_dim", "at_most", 64), 64, True),
        (Limit("head_dim", "at_most", 64), 65, False),
        (Limit("head_dim", "multiple_of", 8), 16, True),
        (Limit("head_dim", "multiple_of", 8), 12, False),
        (Limit("dtype", "one_of", ("float32",)), "float32", True),
        (Limit("dtype", "one_of", ("float32",)), "float16", False),
        (Limit("head_dim", "at_least", 64), None, True),
        (Limit("head_dim", "multiple_of", 8), None, True),
        (Limit("other_v_head_dim", "one_of", (None,)), None, True),
        (Limit("other_v_head_dim", "one_of", (32,)), None, False),
    ],
)
@pytest.mark.scenario("EC-003")
@pytest.mark.scenario("EC-004")
def test_bounds_are_inclusive(limit: Limit, actual: object, accepted: bool) -> None:
    assert limit.accepts(actual) is accepted


@pytest.mark.parametrize(
    ("kind", "bound"),
    [("below", 3), ("one_of", "float32"), ("one_of", ()), ("at_least", None), ("at_most", "8"), ("multiple_of", 0)],
)
def test_limits_that_mean_nothing_are_refused(kind: Any, bound: object) -> None:
    with pytest.raises(SpecError, match=r"required|allowed"):
        Limit("head_dim", kind, bound)


def test_a_rejection_has_a_code_and_both_sides() -> None:
    [found] = rejections(spec(max_head_dim=32).limits, attention())
    assert str(found) == "HEAD_DIM_NOT_AT_MOST: head_dim is 64, required <= 32"
    [found] = rejections(spec(dtypes=("float16", "bfloat16")).limits, attention())
    assert str(found) == "DTYPE_NOT_ONE_OF: dtype is 'float32', required one of 'float16', 'bfloat16'"


# For each kind of declaration: what it refuses, and what it accepts.
@pytest.mark.parametrize(
    ("declared", "refused", "accepted"),
    [
        ({"platforms": ("cuda",)}, {}, {"device": None}),
        ({"min_head_dim": 65}, {}, {"head_dim": 65}),
        pytest.param({"head_dim_multiple": 48}, {}, {"head_dim": 96}, marks=pytest.mark.scenario("EC-011")),
        ({"min_seq_len": 8}, {"operation": "attention.full", "seq_len_q": 7, "seq_len_k": 8}, {}),
        ({"max_seq_len": 8}, {"operation": "attention.full", "seq_len_k": 9}, {}),
        ({"max_batch_size": 1}, {}, {"batch_size": 1}),
        ({"max_score_elements": 511}, {}, {"num_heads": 3}),
        ({}, {"num_kv_heads": 2}, {}),
        ({}, {"attn_mask": "bool"}, {}),
        pytest.param({}, {"dropout_p": 0.1}, {}, marks=pytest.mark.scenario("EC-023")),
        pytest.param({"supports_scale": False}, {"scale": 0.3}, {"scale": 0.125}, marks=pytest.mark.scenario("EC-024")),
        ({}, {"v_head_dim": 32}, {}),
        ({}, {"seq_len_k": 9}, {"operation": "attention.full", "seq_len_k": 9}),
        ({"causal_geometries": ("bottom_right",)}, {}, {"seq_len_k": 9, "causal_alignment": "bottom_right"}),
        pytest.param({"requires_contiguous": True}, {"is_contiguous": False}, {}, marks=pytest.mark.scenario("EC-006")),
        pytest.param(
            {"requires_last_dim_stride1": True}, {"stride_last_dim": 2}, {}, marks=pytest.mark.scenario("EC-007")
        ),
        pytest.param(
            {"deterministic": False}, {"requires_deterministic": True}, {}, marks=pytest.mark.scenario("EC-022")
        ),
        ({}, {"requires_grad": True}, {}),
        ({"extra_limits": (Limit("num_heads", "multiple_of", 3),)}, {}, {"num_heads": 6}),
    ],
)
def test_declarations_refuse_and_accept(
    declared: dict[str, Any], refused: dict[str, Any], accepted: dict[str, Any]
) -> None:
    limits = spec(**declared).limits
    assert len(rejections(limits, attention(**refused))) == 1
    assert rejections(limits, attention(**accepted)) == ()


@pytest.mark.scenario("FS-029")
@pytest.mark.parametrize(
    "kernel_id", ["", "torch", "Torch.sdpa", "torch..sdpa", "torch.sdpa ", "torch/sdpa", "a.b\n", None, 3]
)
def test_malformed_ids_are_refused(kernel_id: object) -> None:
    with pytest.raises(SpecError, match="dotted lower-case words"):
        spec(kernel_id=kernel_id)


@pytest.mark.parametrize("traced", [{"traced_as": "sdpa"}, {"traced_as": "torch.sdpa", "traceable": True}])
def test_a_kernel_is_traced_itself_or_as_another(traced: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="required is one of the two, for traced_as a kernel_id"):
        spec(**traced)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operations": ()}, "at least one name"),
        ({"dtypes": "float32"}, "at least one name"),
        ({"dtypes": ("float32", "fp16")}, "dtypes has 'fp16', allowed: .*float16"),
        ({"platforms": ("gpu",)}, "platforms has 'gpu', allowed: .*cuda"),
        ({"layouts": ("dshb",)}, "layouts has 'dshb'"),
        ({"causal_geometries": ("left",)}, "causal_geometries has 'left'"),
        ({"min_head_dim": 128, "max_head_dim": 64}, "min_head_dim 128 is above max_head_dim 64"),
        ({"max_seq_len": 0}, "max_seq_len is 0, required an integer of at least 1"),
        ({"head_dim_multiple": 0}, "head_dim_multiple is 0"),
        ({"max_batch_size": 2.5}, "max_batch_size is 2.5"),
        ({"extra_limits": (Limit("hed_dim", "at_least", 1),)}, "'hed_dim' in extra_limits is no field"),
    ],
)
def test_contradictory_declarations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        spec(**changes)
    assert "test.kernel" in str(caught.value)
    assert isinstance(caught.value, LayerZeroError)


def select_live(registry: Registry, context: SelectionContext) -> Kernel:
    """What the live selector chooses without policy, breakers and measurements."""
    ranking = LiveSelector(registry, Policy(), {}).rank(context, Prior())
    if not ranking.choices:
        raise no_kernel_error(registry, context, ranking)
    return ranking.choices[0].kernel


@pytest.mark.scenario("EC-027")
def test_one_id_cannot_be_registered_twice() -> None:
    with pytest.raises(ValueError, match=r"'test.kernel' is registered twice"):
        Registry([kernel(), kernel(dtypes=("float16",))])


@pytest.mark.scenario("EC-025")
def test_without_kernels_the_error_says_so() -> None:
    with pytest.raises(NoKernelAvailableError, match=r"no kernel is registered for 'attention.causal'.*: none"):
        select_live(Registry([]), attention())
    with pytest.raises(NoKernelAvailableError, match=r"operations with kernels: attention.causal, attention.full"):
        select_live(Registry([kernel()]), attention("attention.cross", seq_len_k=9))


@pytest.mark.scenario("EC-026")
def test_an_error_tells_why_each_kernel_was_refused() -> None:
    registry = Registry(
        [kernel(max_head_dim=32, max_batch_size=1), kernel(kernel_id="test.other", dtypes=("float16",))]
    )
    with pytest.raises(NoKernelAvailableError) as caught:
        select_live(registry, attention())
    assert set(caught.value.rejections) == {"test.kernel", "test.other"}
    assert len(caught.value.rejections["test.kernel"]) == 2
    for part in (
        "test.kernel: HEAD_DIM_NOT_AT_MOST: head_dim is 64",
        "BATCH_SIZE_NOT_AT_MOST",
        "test.other: DTYPE_NOT",
    ):
        assert part in str(caught.value)


def test_the_live_selector_goes_by_priority_then_by_id() -> None:
    registry = Registry([kernel(kernel_id="test.b"), kernel(kernel_id="test.a"), kernel(priority=60, max_head_dim=32)])
    assert select_live(registry, attention()).kernel_id == "test.a"
    assert select_live(registry, attention(head_dim=32)).kernel_id == "test.kernel"


def test_the_default_is_legal_for_every_call_and_goes_first() -> None:
    """Calls with gradients, a mask or dropout, or unusual strides must find the default among the legal kernels."""
    for operation in OPERATIONS.values():
        [default] = [found for found in builtin_kernels() if found.kernel_id == operation.default_kernel]
        assert Registry(builtin_kernels()).candidates(operation.name)[0] is default
        # Of these the public functions ask for nothing that it refuses: no ragged layout, no quantised form.
        unasked = {"causal_mask", "layout", "quant_format"}
        # What torch's quantised products cannot do at all: float8 on older devices, sums beyond int32.
        unasked |= {"linear.fp8": {"sm"}, "linear.int8": {"in_features"}}.get(operation.name, set())
        assert {limit.field for limit in default.spec.limits} - unasked == {"platform", "dtype"}


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64))
def test_range_and_multiple_limits_agree_with_arithmetic(minimum: int, head_dim: int, multiple: int) -> None:
    limits = spec(min_head_dim=minimum, head_dim_multiple=multiple).limits
    expected = head_dim >= minimum and head_dim % multiple == 0
    assert (rejections(limits, attention(head_dim=head_dim)) == ()) is expected
