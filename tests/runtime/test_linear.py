"""Quantised linear layers: contexts of calls, torch's kernels at their limits, the public functions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import layerzero_runtime as lz
from layerzero_runtime.calls import linear as linear_module
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.dispatch import health, publish_snapshot
from layerzero_runtime.errors import ContextError, ContextTypeError, NoKernelAvailableError
from layerzero_runtime.kernels.torch_linear import MAX_INT8_FEATURES
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.policies.policy import Rule
from layerzero_runtime.selection.limits import rejections
from layerzero_runtime.serving.seen_calls import MAX_SEEN
from layerzero_tune.workload.lines import parse_workload
from tests.runtime.kernel_calls import KERNELS, Call, allowed_error, linear_calls, quantised, relative_error
from tests.runtime.traced_calls import compiled, policy_in_force, registered

DTYPES = {"linear.fp8": "float8_e4m3fn", "linear.int8": "int8"}
PUBLIC: dict[str, Callable[..., torch.Tensor]] = {"linear.fp8": lz.linear_fp8, "linear.int8": lz.linear_int8}
each_operation = pytest.mark.parametrize("operation", DTYPES)
OLDER_GPU = DeviceSpec(platform="cuda", name="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0), multiprocessors=108)
H100 = DeviceSpec(platform="cuda", name="NVIDIA H100 80GB HBM3", compute_capability=(9, 0), multiprocessors=132)


def number(value: float = 0.5) -> torch.Tensor:
    return torch.tensor(value)


def call_of(
    operation: str, leading: tuple[int, ...] = (6,), in_features: int = 64, out_features: int = 48, **given: Any
) -> Call:
    """A call with one scale for each matrix and no bias, unless others are given."""
    torch.manual_seed(0)
    parts = {
        "x": quantised((*leading, in_features), DTYPES[operation]),
        "weight": quantised((out_features, in_features), DTYPES[operation]),
        "scale_x": number(0.5),
        "scale_w": number(0.25),
        "bias": None,
    } | given
    arguments = tuple(parts.values())
    return Call(OPERATIONS[operation].describe(*arguments), arguments)


def assert_right(call: Call, output: torch.Tensor) -> None:
    expected, reference = call.run(call.default()), call.reference()
    assert (output.shape, output.dtype) == (reference[0].shape, torch.bfloat16)
    assert output.is_contiguous()
    assert relative_error((output,), reference) <= allowed_error(call, expected, reference)


# Contexts.


def test_a_line_of_a_workload_needs_no_more_than_the_sizes() -> None:
    """The example of the design."""
    text = (
        '{"operation": "linear.fp8", "dtype": "float8_e4m3fn", "mode": "graph", '
        '"rows": 512, "in_features": 4096, "out_features": 14336}'
    )
    [line] = parse_workload(text, "example")
    context = line.context
    OPERATIONS["linear.fp8"].validate(context)
    assert (context.output_dtype, context.scale_x, context.scale_w, context.has_bias) == (
        "bfloat16",
        "tensor",
        "tensor",
        False,
    )
    assert OPERATIONS["linear.fp8"].sizes(context) == (512, 4096, 14336)
    assert OPERATIONS["linear.fp8"].flops(context) == 2 * 512 * 4096 * 14336
    assert context.to_dict() == json.loads(text)


@each_operation
def test_features_are_read_off_the_tensors(operation: str) -> None:
    call = call_of(operation, (2, 3), 40, 24, scale_x=torch.ones(2, 3, 1), bias=torch.zeros(24).bfloat16())
    context = call.context
    assert (context.rows, context.in_features, context.out_features) == (6, 40, 24)
    assert (context.scale_x, context.scale_w, context.has_bias) == ("row", "tensor", True)
    assert (context.dtype, context.output_dtype, context.other_output_dtype) == (DTYPES[operation], "bfloat16", None)
    key = OPERATIONS[operation].static_key(context)
    assert key == ("eager", DTYPES[operation], "row", "tensor", True, ())


@pytest.mark.parametrize(
    ("leading", "scale", "scaling"),
    [
        ((6,), (), "tensor"),
        ((6,), (1,), "tensor"),
        ((6,), (1, 1), "tensor"),
        ((6,), (6, 1), "row"),
        ((6,), (6,), "row"),
        ((2, 3), (2, 3, 1), "row"),
        ((2, 3), (2, 3), "row"),
        ((), (), "tensor"),
        ((), (1,), "tensor"),
        # Of a single row only the trailing 1 tells.
        ((1,), (1, 1), "row"),
        ((1,), (1,), "tensor"),
        ((1, 1), (1, 1, 1), "row"),
    ],
)
def test_the_shape_of_a_scale_says_what_it_scales(
    leading: tuple[int, ...], scale: tuple[int, ...], scaling: str
) -> None:
    call = call_of("linear.fp8", leading, scale_x=torch.rand(scale) + 0.5)
    assert call.context.scale_x == scaling
    assert_right(call, lz.linear_fp8(*call.arguments))


X, W, S = quantised((6, 64), "float8_e4m3fn"), quantised((48, 64), "float8_e4m3fn"), torch.tensor(1.0)


@pytest.mark.scenario("EC-013")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, W[:, :32], S, S), r"weight has shape \(48, 32\), required \(out_features, 64\)"),
        ((X, W[0], S, S), r"weight has shape \(64,\), required \(out_features, 64\)"),
        ((X, W.to(torch.float8_e5m2), S, S), "dtypes differ: x float8_e4m3fn, weight float8_e5m2"),
        ((X, W, S.double(), S), "scale_x is float64, required float32"),
        ((X, W, S, S.half()), "scale_w is float16, required float32"),
        ((X, W, torch.ones(5, 1), S), r"scale_x has shape \(5, 1\), required one element, .*: \(6, 1\) or \(6,\)"),
        ((X, W, S, torch.ones(1, 48)), r"scale_w has shape \(1, 48\), required .*: \(48, 1\) or \(48,\)"),
        ((X, W, S, S, torch.zeros(48)), "bias is float32, required bfloat16"),
        ((X, W, S, S, torch.zeros(1, 48).bfloat16()), r"bias has shape \(1, 48\), required \(48,\)"),
        ((X, W.to("meta"), S, S), "different devices: x cpu, weight meta"),
        ((X, W, S, S.to("meta")), "different devices: .*scale_w meta"),
        ((X[0, 0], W, S, S), "no dimension"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    lz.linear_fp8(X, W, S, S)  # so that a fast path is there to be taken wrongly
    with pytest.raises(ContextError, match=message):
        lz.linear_fp8(*arguments)


@pytest.mark.parametrize("other", [1.0, [1.0], None])
def test_what_is_no_tensor_is_refused(other: Any) -> None:
    with pytest.raises(ContextTypeError, match="scale_x must be a tensor, not "):
        lz.linear_fp8(X, W, other, S)


def test_matrices_of_other_dtypes_have_no_kernel() -> None:
    with pytest.raises(NoKernelAvailableError, match="DTYPE_NOT_ONE_OF: dtype is 'float8_e5m2'"):
        lz.linear_fp8(X.to(torch.float8_e5m2), W.to(torch.float8_e5m2), S, S)
    with pytest.raises(NoKernelAvailableError, match="DTYPE_NOT_ONE_OF: dtype is 'float8_e4m3fn'"):
        lz.linear_int8(X, W, S, S)


# Kernels.


@each_operation
@pytest.mark.parametrize(("rows", "in_features", "out_features"), [(1, 1, 1), (1, 70, 5), (5, 1, 72), (9, 70, 1)])
def test_single_rows_and_features_are_right_at_any_strides(
    operation: str, rows: int, in_features: int, out_features: int
) -> None:
    """torch._int_mm reads beside matrices whose strides are those of transposed columns."""
    placements = ("contiguous", "transposed", "sliced", "strided")
    for x, weight in itertools.product(placements, placements):
        call = call_of(
            operation,
            x=quantised((rows, in_features), DTYPES[operation], x),
            weight=quantised((out_features, in_features), DTYPES[operation], weight),
        )
        for kernel in KERNELS.values():
            if call.accepts(kernel):
                assert relative_error(call.run(kernel), call.reference()) < 1e-2, (kernel.kernel_id, x, weight)


def test_sums_beyond_int32_are_left_to_a_wider_product() -> None:
    features = MAX_INT8_FEATURES + 1
    x = torch.full((1, features), -128, dtype=torch.int8)
    call = call_of("linear.int8", x=x, weight=x)
    assert int(torch._int_mm(x, x.t())) < 0  # an overflow
    assert [str(reason) for reason in rejections(KERNELS["torch.int_mm"].spec.limits, call.context)] == [
        "IN_FEATURES_NOT_AT_MOST: in_features is 131072, required <= 131071"
    ]
    torch.testing.assert_close(lz.linear_int8(*call.arguments).double(), call.reference()[0], rtol=5e-3, atol=0)


def test_devices_without_float8_get_the_wider_product() -> None:
    context = call_of("linear.fp8").context
    for device, kernel_id in ((OLDER_GPU, "torch.linear_fp8.widened"), (H100, "torch.scaled_mm")):
        assert lz.select(context.with_device(device)).kernel_id == kernel_id
    refused = rejections(KERNELS["torch.scaled_mm"].spec.limits, context.with_device(OLDER_GPU))
    assert [str(reason) for reason in refused] == ["SM_NOT_AT_LEAST: sm is (8, 0), required >= (8, 9)"]


@each_operation
def test_the_result_needs_no_cast(operation: str) -> None:
    plan = lz.select(call_of(operation).context)
    assert plan.post_transforms == ()
    wider = lz.select(replace(call_of(operation).context, output_dtype="float32"))
    assert [(step.kind, step.target) for step in wider.post_transforms] == [("cast", "float32")]


# The public functions.


@settings(max_examples=60, deadline=None)
@given(st.data())
@each_operation
def test_public_calls_agree_with_the_reference(operation: str, data: st.DataObject) -> None:
    call = data.draw(linear_calls(operation, DTYPES[operation]))
    for _ in range(2):
        assert_right(call, PUBLIC[operation](*call.arguments))


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operations whose calls were described, in order; nothing was seen before."""
    publish_snapshot()
    found: list[str] = []
    serve = vars(linear_module)["serve"]

    def noted(snapshot: Any, operation: Any, *rest: Any, **options: Any) -> Any:
        found.append(operation.name)
        return serve(snapshot, operation, *rest, **options)

    monkeypatch.setattr(linear_module, "serve", noted)
    return found


BY_ROW: dict[str, Any] = {"scale_x": torch.rand(6, 1), "scale_w": torch.rand(48, 1), "bias": torch.ones(48).bfloat16()}


@each_operation
@pytest.mark.parametrize("given", [{}, BY_ROW], ids=["tensor", "row"])
def test_calls_that_differ_in_rows_alone_are_served_by_themselves(
    operation: str, given: dict[str, Any], described: list[str]
) -> None:
    first = call_of(operation, **given)
    PUBLIC[operation](*first.arguments)
    assert described == [operation]
    for rows in (6, 9, 2):
        scale = {"scale_x": torch.rand(rows, 1)} if given else {}
        other = call_of(operation, (rows,), **{**given, **scale})
        assert_right(other, PUBLIC[operation](*other.arguments))
    assert described == [operation]


CHANGES: dict[str, dict[str, Any]] = {
    "in_features": {"in_features": 32},
    "out_features": {"out_features": 40},
    "leading dimensions": {"leading": (2, 3)},
    "one scale for each row of x": {"scale_x": torch.rand(6, 1)},
    "one scale for each row of the weight": {"scale_w": torch.rand(48, 1)},
    "a bias": {"bias": torch.ones(48).bfloat16()},
    "gradients": {"scale_x": torch.nn.Parameter(torch.tensor(0.5))},
    "scales of another shape": {"scale_x": torch.tensor([0.5])},
}


@each_operation
@pytest.mark.parametrize("change", CHANGES)
def test_calls_of_another_kind_are_described(operation: str, change: str, described: list[str]) -> None:
    PUBLIC[operation](*call_of(operation).arguments)
    described.clear()
    other = call_of(operation, **CHANGES[change])
    output = PUBLIC[operation](*other.arguments)
    with torch.no_grad():
        assert_right(other, output)
    assert described == [operation]
    PUBLIC[operation](*call_of(operation).arguments)
    assert described == [operation]


@each_operation
def test_scales_of_other_rows_are_refused_by_calls_that_were_seen(operation: str) -> None:
    """Not only where a miss describes them: with a table that serves them at once, too."""
    snapshot = publish_snapshot()
    call = call_of(operation, (2, 3), scale_x=torch.rand(2, 3, 1))
    PUBLIC[operation](*call.arguments)
    [kind] = getattr(snapshot.seen, PUBLIC[operation].__name__)
    functions: list[Callable[..., object]] = kind[5]
    functions[:] = [lambda *arguments: "served"]
    assert str(PUBLIC[operation](*call.arguments)) == "served"
    x, weight, _, *rest = call.arguments
    for shape in ((3, 2, 1), (3, 1, 1), (6, 1)):
        with pytest.raises(ContextError, match="scale_x has shape"):
            PUBLIC[operation](x, weight, torch.rand(shape), *rest)


@each_operation
def test_surroundings_are_seen(operation: str, described: list[str]) -> None:
    call = call_of(operation)
    expected = PUBLIC[operation](*call.arguments)
    for surrounding in (torch.autocast("cpu", dtype=torch.bfloat16), torch.device("cpu"), torch.inference_mode()):
        described.clear()
        with surrounding:
            assert torch.equal(PUBLIC[operation](*call.arguments), expected)
        assert described == [operation]


@each_operation
def test_no_more_kinds_are_kept_than_asked_again(operation: str) -> None:
    snapshot = publish_snapshot()
    for width in range(MAX_SEEN + 3):
        PUBLIC[operation](*call_of(operation, out_features=width + 1).arguments)
    assert len(getattr(snapshot.seen, PUBLIC[operation].__name__)) == MAX_SEEN


@each_operation
def test_a_kernel_that_raises_gives_way(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a call that was seen before. Other errors of the default are the caller's."""
    call = call_of(operation)
    PUBLIC[operation](*call.arguments)
    name = "_scaled_mm" if operation == "linear.fp8" else "_int_mm"

    def failing(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, name, failing)
    output = PUBLIC[operation](*call.arguments)
    assert relative_error((output,), call.reference()) < 1e-2
    assert OPERATIONS[operation].default_kernel in lz.stats().broken
    health().reset()
    publish_snapshot()


@pytest.mark.scenario("EC-001")
@each_operation
def test_empty_calls_are_torchs(operation: str) -> None:
    bias = torch.randn(48).bfloat16()
    for leading, in_features in (((0,), 64), ((2, 0), 64), ((3,), 0)):
        call = call_of(operation, leading=(1,), bias=bias)
        x = call.arguments[0].new_empty(*leading, in_features)
        weight = call.arguments[1].new_empty(48, in_features)
        output = PUBLIC[operation](x, weight, *call.arguments[2:])
        assert output.shape == (*leading, 48)
        assert torch.equal(output, bias.expand(*leading, 48))


@pytest.mark.scenario("EC-016")
def test_nan_does_not_vanish() -> None:
    x = X.clone()
    x[2, 5] = float("nan")
    output = lz.linear_fp8(x, W, S, S)
    assert output[2].isnan().all()
    assert output[[0, 1, 3, 4, 5]].isfinite().all()


@each_operation
def test_a_bias_that_needs_gradients_is_served_as_by_torch(operation: str) -> None:
    bias = torch.nn.Parameter(torch.zeros(48).bfloat16())
    call = call_of(operation, bias=bias)
    output = PUBLIC[operation](*call.arguments)
    assert output.requires_grad
    with torch.no_grad():
        assert not PUBLIC[operation](*call.arguments).requires_grad
    if operation == "linear.fp8":
        with pytest.raises(RuntimeError, match="derivative for aten::_scaled_mm is not implemented"):
            torch.autograd.backward(output.sum())
    else:
        [gradient] = torch.autograd.grad(output.sum(), [bias])
        assert torch.equal(gradient, torch.full((48,), 6.0).bfloat16())


# Bound and compiled.


@each_operation
def test_a_bound_function_serves_all_sizes(operation: str) -> None:
    features: dict[str, Any] = {"dtype": DTYPES[operation], "scale_x": "row", "has_bias": True}
    bound = lz.bind(operation, **features)
    for rows, width in ((6, 48), (1, 48), (6, 40), (6, 48), (0, 48)):
        bias = torch.ones(width).bfloat16()
        if rows:
            call = call_of(operation, (rows,), out_features=width, scale_x=torch.rand(rows, 1), bias=bias)
            assert_right(call, bound(*call.arguments))
        else:
            x, weight, _, *rest = call.arguments
            assert bound(x[:0], weight, torch.rand(0, 1), *rest).shape == (0, width)
    assert callable(bound.kernel(6, 64, 48))  # type: ignore[attr-defined]


@each_operation
@pytest.mark.parametrize("kernel_id", ["default", "widened", "operator"])
def test_compiled_calls_agree(operation: str, kernel_id: str) -> None:
    rules = {
        "default": (),
        "widened": (Rule(kernel="torch.linear_*.widened"),),
        "operator": (Rule(kernel="test.linear"),),
    }
    spec = lz.KernelSpec(
        kernel_id="test.linear",
        operations=(operation,),
        platforms=("cpu",),
        dtypes=(DTYPES[operation],),
        library="test",
        requires=(),
        priority=1,
    )

    def untraced(x: Any, weight: Any, scale_x: Any, scale_w: Any, bias: Any) -> Any:
        result = OPERATIONS[operation].reference(untraced_context, x, weight, scale_x, scale_w, bias)
        return result[0].bfloat16()

    first = call_of(operation, scale_x=torch.rand(6, 1), bias=torch.ones(48).bfloat16())
    untraced_context = first.context
    with registered(spec, untraced), policy_in_force(lz.Policy(locks=rules[kernel_id])):
        with compiled(PUBLIC[operation]) as (function, graphs):
            for rows in (6, 9, 17):
                call = call_of(operation, (rows,), scale_x=torch.rand(rows, 1), bias=torch.ones(48).bfloat16())
                assert_right(call, function(*call.arguments))
        [called] = graphs.functions()
    product = "_scaled_mm" if operation == "linear.fp8" else "_int_mm"
    assert (product in called) is (kernel_id == "default")
    assert any(name.startswith("layerzero.test_linear_") for name in called) is (kernel_id == "operator")
