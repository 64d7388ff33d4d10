"""Traced calls that a table does not serve: what others want to see, what is not known, what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import layerzero_runtime as lz
from layerzero_runtime.integrations.tracing import serve_traced
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.snapshot import Snapshot
from tests.runtime.call_examples import each_call, qkv, rows
from tests.runtime.public_calls import PublicCall, as_outputs
from tests.runtime.test_interception import Marked
from tests.runtime.traced_calls import TRACED, compiled, on_tensors, policy_in_force, registered

FLASH, SDPA = "_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention"


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return lz.attention(query, key, value, is_causal=True)


def tensors(length: int = 12) -> list[Tensor]:
    return [torch.randn(1, 5, length, 16) for _ in range(3)]


def with_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*given: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(*given)

    return inside


def with_vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: torch.vmap(function)(*(torch.stack([part, part * 0.5]) for part in given))


def with_subclass(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: function(*(part.as_subclass(Marked) for part in given))


@each_call
@pytest.mark.parametrize("within", [with_autocast, with_vmap])
def test_intercepted_calls_are_torchs(call: PublicCall, within: Any, shared_snapshot: Snapshot) -> None:
    function, given = on_tensors(call)
    before = lz.stats()["intercepted"]
    with compiled(within(function), backend="aot_eager") as (traced, _):
        found = traced(*given)
    assert lz.stats()["intercepted"] > before

    def default(*parts: Tensor) -> Any:
        remaining = iter(parts)
        return call.on(*(next(remaining) if isinstance(part, Tensor) else part for part in call.arguments)).default()

    for one, other in zip(found, within(default)(*given), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)


class Doubled(TorchFunctionMode):
    """Doubles what torch's attention gives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.nn.functional.scaled_dot_product_attention else result


def test_subclasses_and_function_modes_reach_torch(shared_snapshot: Snapshot) -> None:
    query, key, value = given = tensors()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    before = lz.stats()["intercepted"]
    with compiled(causal) as (traced, graphs):
        traced(*given)
        output = traced(*(part.as_subclass(Marked) for part in given))
        assert type(output) is Marked
        torch.testing.assert_close(output.as_subclass(Tensor), expected)
        with Doubled():
            traced(*given)
    assert graphs.functions()[0] == {FLASH}
    assert graphs.functions()[-1] == {SDPA, "mul"}
    assert lz.stats()["intercepted"] == before + 2


def test_gradients_of_transforms_flow(shared_snapshot: Snapshot) -> None:
    given = tensors()

    def gradient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda part: causal(part, key, value).sum())(query)
        return found

    with compiled(gradient, backend="aot_eager") as (traced, _):
        torch.testing.assert_close(traced(*given), gradient(*given))


def test_sizes_that_data_decide_take_the_default(shared_snapshot: Snapshot) -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return lz.rms_norm(x[x[:, 0] > 0], weight)

    x, weight = rows(40, 128), rows(128)
    with (
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        compiled(function) as (traced, graphs),
    ):
        for count in (40, 30):
            torch.testing.assert_close(traced(x[:count].clone(), weight), function(x[:count], weight))
    assert len(graphs) == 1
    assert lz.stats()["unknown_sizes"] == 1


def test_empty_calls_take_the_default(shared_snapshot: Snapshot) -> None:
    empty = torch.empty(0, 5, 12, 16)
    for function, given in (
        (causal, (empty, empty, empty)),
        (lz.rms_norm, (torch.empty(0, 128), rows(128))),
        (lz.swiglu, (torch.empty(3, 0), torch.empty(3, 0))),
    ):
        with compiled(function) as (traced, _):
            assert traced(*given).shape == given[0].shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda query, key, value: lz.attention(query, key, value, layout="sbhd"), "layout is 'sbhd'"),
        (lambda query, key, value: lz.attention(query, key[:, :1], value[:, :1]), "pass enable_gqa=True"),
        (lambda query, key, value: lz.attention(query, key[:, :, :3], value), "shapes do not fit together"),
        (lambda query, key, value: lz.attention(query, cast(Tensor, None), value), "key must be a tensor"),
        (lambda query, key, value: lz.rms_norm(query, key), "weight has shape"),
        (lambda query, key, value: lz.swiglu(query, key[:, :, :3]), "shapes differ"),
        (lambda query, key, value: lz.swiglu(query, key.double()), "dtypes differ"),
    ],
)
def test_what_does_not_fit_is_refused_as_in_eager_calls(call: Any, message: str, shared_snapshot: Snapshot) -> None:
    given = tensors()
    with pytest.raises((lz.LayerZeroError, ValueError, TypeError), match=message):
        call(*given)
    with compiled(call) as (traced, _), pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        traced(*given)
    with compiled(call, fullgraph=False) as (traced, _), pytest.raises(lz.LayerZeroError, match=message):
        traced(*given)


def test_behind_a_graph_break_calls_are_eager_ones(shared_snapshot: Snapshot) -> None:
    """Dynamo cannot trace what its declaration says that it can; without fullgraph that costs the graph alone."""
    spec = lz.KernelSpec(
        kernel_id="mine.untraceable",
        operations=("mlp.swiglu",),
        platforms=("cpu",),
        dtypes=("float64",),
        library="mine",
        priority=200,
        traceable=True,
    )

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return torch.sigmoid(gate) * gate * up

    gate, up = rows(6, 24).double(), rows(6, 24).double()
    with registered(spec, swiglu), compiled(lambda: lz.swiglu(gate + 1, up), fullgraph=False) as (traced, _):
        torch.testing.assert_close(traced(), swiglu(gate + 1, up))


def test_outside_of_a_trace_the_traced_way_serves_eager_calls(shared_snapshot: Snapshot) -> None:
    """Where Dynamo gives up on a frame, Python runs it, whatever was traced before."""
    with compiled(lz.swiglu) as (traced, _):
        traced(rows(4, 40), rows(4, 40))
    gate, up = rows(6, 24), rows(6, 24)
    before = lz.stats()["calls"]
    torch.testing.assert_close(serve_traced("mlp.swiglu", (gate, up), {}), lz.swiglu(gate, up))
    assert lz.stats()["calls"] == before + 2


def test_beyond_dynamos_limit_calls_are_eager_ones(shared_snapshot: Snapshot) -> None:
    with (
        compiled(lambda query, key, value: causal(query * 2, key, value), fullgraph=False) as (traced, _),
        torch._dynamo.config.patch(recompile_limit=1),
    ):
        for length in (3, 12, 40, 70, 13):
            query, key, value = tensors(length)
            torch.testing.assert_close(traced(query, key, value), causal(query * 2, key, value))


def test_features_that_were_not_measured_take_the_default(shared_snapshot: Snapshot) -> None:
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    options: list[dict[str, Any]] = [
        {"attn_mask": mask},
        {"dropout_p": 0.5, "is_causal": True},
        {"is_causal": True, "scale": 0.3},
    ]
    for option in options:
        with compiled(lambda query, key, value, option=option: lz.attention(query, key, value, **option)) as (
            traced,
            graphs,
        ):
            traced(*tensors())
        assert graphs.functions() == [{SDPA}]


def test_the_usual_scale_is_no_feature(shared_snapshot: Snapshot) -> None:
    with compiled(partial(lz.attention, is_causal=True, scale=0.25)) as (traced, graphs):
        traced(*tensors())
    assert graphs.functions() == [{FLASH}]


def test_guards_on_strides_are_checked_while_tracing(shared_snapshot: Snapshot) -> None:
    """The flash kernel reads a last dimension of stride 1; where it is not, the plan behind it serves."""
    strided = [torch.randn(1, 5, 12, 32)[..., ::2] for _ in range(3)]
    with compiled(causal) as (traced, graphs):
        traced(*tensors())
        traced(*tensors(13))
        torch.testing.assert_close(traced(*strided), causal(*strided))
    assert graphs.functions() == [{FLASH}, {SDPA}]


def test_determinism_that_is_asked_for_is_a_feature(shared_snapshot: Snapshot) -> None:
    with compiled(causal) as (traced, graphs):
        traced(*tensors())
        torch.use_deterministic_algorithms(True)
        try:
            traced(*tensors())
        finally:
            torch.use_deterministic_algorithms(False)
    assert graphs.functions() == [{FLASH}, {SDPA}]


def test_the_mode_is_that_of_the_trace(shared_snapshot: Snapshot) -> None:
    """The synthetic table knows no graph mode, so in it every call misses."""
    with compiled(causal) as (traced, graphs), lz.execution_mode("graph"):
        traced(*tensors())
    with compiled(causal) as (traced, eager_graphs):
        traced(*tensors())
    assert graphs.functions() == [{SDPA}]
    assert eager_graphs.functions() == [{FLASH}]


def test_export_takes_the_default(shared_snapshot: Snapshot) -> None:
    class Layer(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return causal(query, key, value)

    program = torch.export.export(Layer(), tuple(tensors()), strict=False)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["aten.scaled_dot_product_attention.default"]


def _grouped(**options: Any) -> Any:
    return lambda query, key, value: lz.attention(query, key, value, enable_gqa=True, **options)


X, WEIGHT = rows(6, 24), rows(24)
KERNEL_CALLS: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "attention.causal": (_grouped(is_causal=True, causal_alignment="bottom_right"), qkv(6, 9)),
    "attention.full": (_grouped(), qkv(6, 6)),
    "attention.cross": (_grouped(), qkv(6, 9)),
    "norm.rms": (lz.rms_norm, (X, WEIGHT)),
    "norm.add_rms": (lz.add_rms_norm, (X, X + 1, WEIGHT)),
    "norm.layer": (lz.layer_norm, (X, WEIGHT, WEIGHT + 1)),
    "mlp.swiglu": (lz.swiglu, (X, X + 1)),
    "mlp.geglu": (lz.geglu, (X, X + 1)),
}


@pytest.mark.parametrize("needs_gradients", [False, True])
@pytest.mark.parametrize(
    "kernel_id",
    [
        kernel.kernel_id
        for kernel in builtin_kernels()
        # Those of linear layers are asked for in test_linear_calls.py: they have no gradients.
        if "cpu" in kernel.spec.platforms and kernel.spec.operations[0] in KERNEL_CALLS
    ],
)
def test_a_kernel_that_is_asked_for_serves_where_it_may(
    kernel_id: str, needs_gradients: bool, shared_snapshot: Snapshot
) -> None:
    """In the form that its declaration says, and with the default's gradients; one without a backward serves only
    where none are needed."""
    kernel = shared_snapshot.registry.get(kernel_id)
    assert kernel is not None
    operation = "attention.cross" if "folded" in kernel_id else kernel.spec.operations[0]
    function, given = KERNEL_CALLS[operation]
    leaves = [part.clone().requires_grad_(needs_gradients) for part in given]
    with policy_in_force(Policy(locks=(Rule(kernel=kernel_id),))), compiled(function) as (traced, graphs):
        outputs = as_outputs(traced(*leaves))
        found = torch.autograd.grad([part.square().sum() for part in outputs], leaves) if needs_gradients else outputs
    expected = as_outputs(function(*leaves))
    if needs_gradients:
        expected = torch.autograd.grad([part.square().sum() for part in expected], leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    may_serve = kernel.spec.supports_backward or not needs_gradients
    serves = (kernel.spec.traced_as or kernel_id) if may_serve else OPERATIONS[operation].default_kernel
    (functions,) = graphs.functions()
    if serves in TRACED:
        assert TRACED[serves] <= functions
    else:
        assert [called.startswith(f"layerzero.{serves.replace('.', '_')}_") for called in functions] == [True]
