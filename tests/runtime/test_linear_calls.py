"""`linear_fp8` and `linear_int8`: right results, calls that are served by themselves, bound and compiled ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import layerzero_runtime as lz
from layerzero_runtime.calls import linear as linear_module
from layerzero_runtime.dispatch import health, publish_snapshot
from layerzero_runtime.errors import ContextError, PolicyLoadError
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.policies.policy import Rule
from layerzero_runtime.policies.policy_file import parse_policy
from layerzero_runtime.serving.seen_calls import MAX_SEEN
from tests.runtime.kernel_calls import linear_calls, relative_error
from tests.runtime.linear_examples import DTYPES, PUBLIC, assert_right, call_of, each_operation
from tests.runtime.traced_calls import compiled, policy_in_force, registered


def spec_of(operation: str) -> lz.KernelSpec:
    """A kernel of the test's own."""
    return lz.KernelSpec(
        kernel_id="test.linear",
        operations=(operation,),
        platforms=("cpu",),
        dtypes=(DTYPES[operation],),
        library="test",
        requires=(),
        priority=1,
    )


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
    call = call_of("linear.fp8")
    call.arguments[0][2, 5] = float("nan")
    output = lz.linear_fp8(*call.arguments)
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


@each_operation
def test_verified_calls_are_compared_as_precisely_as_their_results_are(operation: str) -> None:
    call = call_of(operation, scale_x=torch.rand(6, 1), bias=torch.ones(48).bfloat16())
    spec = spec_of(operation)
    before = lz.stats()
    lz.verify_results(every=1)
    try:
        PUBLIC[operation](*call.arguments)
        assert (lz.stats()["verified"], lz.stats().get("wrong_results", 0)) == (
            before.get("verified", 0) + 1,
            before.get("wrong_results", 0),
        )
        wrong = 1.02 * call.reference()[0].bfloat16()
        with (
            registered(spec, lambda *arguments: wrong),
            policy_in_force(lz.Policy(locks=(Rule(kernel="test.linear"),))),
        ):
            assert_right(call, PUBLIC[operation](*call.arguments))
        assert lz.stats()["wrong_results"] == before.get("wrong_results", 0) + 1
    finally:
        lz.verify_results(None)
        health().reset()
        publish_snapshot()


def test_policies_tell_scalings_apart() -> None:
    rule = "version: 1\nlocks: [{kernel: torch.linear_fp8.widened, when: {scale_x: row}}]\n"
    with policy_in_force(parse_policy(rule, "policy.yaml")):
        for shape, kernel_id in (((), "torch.scaled_mm"), ((6, 1), "torch.linear_fp8.widened")):
            assert lz.select(call_of("linear.fp8", scale_x=torch.rand(shape)).context).kernel_id == kernel_id
    with pytest.raises(PolicyLoadError, match=r"scale_x.*'column'.*tensor, row"):
        parse_policy(rule.replace("row", "column"), "policy.yaml")


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
    spec = spec_of(operation)

    def untraced(x: Any, weight: Any, scale_x: Any, scale_w: Any, bias: Any) -> Any:
        result = OPERATIONS[operation].reference(untraced_context, x, weight, scale_x, scale_w, bias)
        return result[0].bfloat16()

    def shifted(*arguments: Any) -> torch.Tensor:
        # Which Dynamo refuses where the traced result has another width.
        return PUBLIC[operation](*arguments) + torch.zeros(48, dtype=torch.bfloat16)

    first = call_of(operation, scale_x=torch.rand(6, 1), bias=torch.ones(48).bfloat16())
    untraced_context = first.context
    with registered(spec, untraced), policy_in_force(lz.Policy(locks=rules[kernel_id])):
        with compiled(shifted) as (function, graphs):
            for rows in (6, 9, 17):
                call = call_of(operation, (rows,), scale_x=torch.rand(rows, 1), bias=torch.ones(48).bfloat16())
                assert_right(call, function(*call.arguments))
        [called] = graphs.functions()
    product = "_scaled_mm" if operation == "linear.fp8" else "_int_mm"
    assert (product in called) is (kernel_id == "default")
    assert any(name.startswith("layerzero.test_linear_") for name in called) is (kernel_id == "operator")
