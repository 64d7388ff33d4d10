"""Kernels that Dynamo cannot trace are operators of torch in a graph, with shapes for tracing and a backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import layerzero_runtime as lz
from layerzero_runtime.errors import KernelOutputError
from layerzero_runtime.integrations import kernel_operators
from layerzero_runtime.snapshot import Snapshot
from tests.runtime.call_examples import qkv, rows
from tests.runtime.public_calls import as_outputs
from tests.runtime.traced_calls import TRACED, compiled, registered

SPEC: dict[str, Any] = {"platforms": ("cpu",), "library": "mine", "priority": 200}


def untraceable() -> None:
    """What Dynamo refuses to trace."""
    torch._dynamo.graph_break()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    untraceable()
    return torch.sigmoid(gate).mul(gate).mul(up)


def swiglu_written_out(gate: Tensor, up: Tensor) -> Tensor:
    return torch.sigmoid(gate) * gate * up


def norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    untraceable()
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight + offset if weight is not None else None, eps)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    untraceable()
    total = x + residual
    return torch.nn.functional.rms_norm(total, x.shape[-1:], weight, eps), total


def attention_bshd(query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float, scale: Any) -> Tensor:
    untraceable()
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
    return output.transpose(1, 2)


def spec(kernel_id: str, *operations: str, **limits: Any) -> lz.KernelSpec:
    return lz.KernelSpec(kernel_id=kernel_id, operations=operations, **{**SPEC, "dtypes": ("float64",), **limits})


KERNELS: dict[str, tuple[lz.KernelSpec, Callable[..., Any]]] = {
    "mlp.swiglu": (spec("mine.swiglu", "mlp.swiglu", supports_backward=True), swiglu),
    "norm.rms": (spec("mine.norm", "norm.rms", supports_backward=True), norm),
    "norm.add_rms": (spec("mine.add_norm", "norm.add_rms", supports_backward=True), add_norm),
    "attention": (
        spec(
            "mine.attention",
            "attention.full",
            "attention.cross",
            layouts=("bshd",),
            supports_gqa=True,
            supports_v_head_dim=True,
            supports_backward=True,
        ),
        attention_bshd,
    ),
}
X, WEIGHT = rows(6, 24).double(), rows(24).double()
QKV = tuple(part.double() for part in qkv(6, 9))
CALLS: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "mlp.swiglu": (lz.swiglu, (X, X + 1)),
    "norm.rms": (lambda x, weight: lz.rms_norm(x, weight, 1e-5, 1.0), (X, WEIGHT)),
    "norm.add_rms": (lz.add_rms_norm, (X, X + 1, WEIGHT)),
    "attention": (lambda query, key, value: lz.attention(query, key, value, enable_gqa=True), QKV),
}
each_operator = pytest.mark.parametrize("name", CALLS)


@pytest.fixture
def mine() -> Iterator[None]:
    """All of these kernels, chosen wherever they are legal."""
    lz.register_kernels(list(KERNELS.values()))
    yield
    for kernel_spec, _ in KERNELS.values():
        lz.unregister_kernel(kernel_spec.kernel_id)


@each_operator
def test_a_kernel_that_cannot_be_traced_is_one_operator_for_all_sizes(name: str, mine: None) -> None:
    function, tensors = CALLS[name]
    kernel_id = KERNELS[name][0].kernel_id
    with compiled(function) as (traced, graphs):
        for size in (6, 5, 3):
            given = tuple((part if part.dim() == 1 else part[..., :size, :]).contiguous().clone() for part in tensors)
            torch.testing.assert_close(traced(*given), function(*given))
    (functions,) = graphs.functions()
    (operator,) = {called for called in functions if called != "transpose"}
    assert operator.startswith(f"layerzero.{kernel_id.replace('.', '_')}_")


@each_operator
def test_operators_pass_torchs_own_checks(name: str, mine: None) -> None:
    function, tensors = CALLS[name]
    with compiled(function) as (traced, graphs):
        traced(*tensors)
    (node,) = [node for node in graphs.traced[0].graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    given = iter(part.transpose(1, 2) if part.dim() == 4 else part for part in tensors)
    arguments = [next(given) if isinstance(part, torch.fx.Node) else part for part in node.args]
    for needs_gradients in (False, True):
        leaves = [
            part.detach().clone().requires_grad_(needs_gradients) if isinstance(part, Tensor) else part
            for part in arguments
        ]
        outcomes = torch.library.opcheck(node.target, tuple(leaves))
        assert set(outcomes.values()) == {"SUCCESS"}


@each_operator
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradients_flow_through_operators(name: str, backend: str, mine: None) -> None:
    function, tensors = CALLS[name]
    leaves = [part.detach().clone().requires_grad_() for part in tensors]
    with compiled(function, backend=backend) as (traced, _):
        assert torch.autograd.gradcheck(traced, leaves, fast_mode=True)
        # Not every input may need a gradient, and of two results one may go unused.
        leaves[0].requires_grad_(False)
        found, expected = (
            torch.autograd.grad(as_outputs(call(*leaves))[0].square().sum(), leaves[1:]) for call in (traced, function)
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_backward_is_an_operator_that_works_below_autograd(mine: None) -> None:
    with compiled(lz.swiglu) as (traced, graphs):
        traced(X, X + 1)
    (name,) = graphs.functions()[0]
    backward = getattr(torch.ops.layerzero, f"{name.split('.')[1]}_backward").default
    gate, up, gradient = X.clone().requires_grad_(), (X + 1).requires_grad_(), torch.ones_like(X)
    expected = torch.autograd.grad(swiglu_written_out(gate, up), (up, gate), gradient)
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        found = backward([gradient], [1, 0], X, X + 1)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_results_are_dense_and_of_the_dtype_of_the_default(snapshot: Snapshot) -> None:
    def mixed(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        untraceable()
        return norm(x.float(), weight.float(), eps, offset).t().contiguous().t()

    accepted = spec("mine.mixed", "norm.rms", dtypes=("bfloat16",), supports_mixed_weight_dtype=True)
    x, weight = rows(6, 24).bfloat16(), rows(24)
    default = torch.nn.functional.rms_norm(x, (24,), weight, 1e-6)
    with registered(accepted, mixed), compiled(lz.rms_norm, backend="inductor") as (traced, _):
        output = traced(x, weight)
    assert output.is_contiguous()
    assert output.dtype == default.dtype
    torch.testing.assert_close(output, default, atol=2e-2, rtol=2e-2)


def test_a_result_of_the_wrong_shape_is_an_error(snapshot: Snapshot) -> None:
    def transposed(gate: Tensor, up: Tensor) -> Tensor:
        untraceable()
        return (gate * up).t()

    refused = pytest.raises(KernelOutputError, match=r"mine.wrong output 0 has shape \(24, 6\)")
    with registered(spec("mine.wrong", "mlp.swiglu"), transposed), compiled(lz.swiglu) as (traced, _), refused:
        traced(X, X)


def test_a_kernel_that_is_registered_anew_takes_over_its_operator(snapshot: Snapshot) -> None:
    def halved(gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate, up) / 2

    with compiled(lz.swiglu) as (traced, graphs):
        with registered(*KERNELS["mlp.swiglu"]):
            whole = traced(X, X)
        with registered(KERNELS["mlp.swiglu"][0], halved):
            torch.testing.assert_close(traced(X, X), whole / 2)
        torch.testing.assert_close(traced(X, X), whole)
    first, second, default = graphs.functions()
    assert first == second != default


def test_beyond_the_most_operators_a_kernel_is_refused(mine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_operators, "MAX_OPERATORS", len(kernel_operators._operators))
    # Another offset is another set of static features.
    refused = pytest.raises(torch._dynamo.exc.Unsupported, match=r"KernelExecutionError.*mine.norm needs an operator")
    with compiled(lambda x, weight: lz.rms_norm(x, weight, 1e-5, 2.0)) as (traced, _), refused:
        traced(X, WEIGHT)


def test_an_operator_keeps_the_strides_that_its_kernel_asks_for(snapshot: Snapshot) -> None:
    """Inductor may lay out what lies between two calls as it likes, but not what an operator is given."""

    def columns(gate: Tensor, up: Tensor) -> Tensor:
        untraceable()
        assert gate.stride() == (1, 6)
        return swiglu(gate, up)

    def function(x: Tensor) -> Any:
        gate = torch.empty_strided((6, 24), (1, 6), dtype=x.dtype).copy_(x) + 1
        return lz.swiglu(gate, gate + 1)

    with registered(spec("mine.columns", "mlp.swiglu"), columns), compiled(function, backend="inductor") as (traced, _):
        gate = X + 1
        torch.testing.assert_close(traced(X), torch.nn.functional.silu(gate) * (gate + 1))


@pytest.mark.parametrize("stand_in", ["torch.rms_norm.vector_norm", "no.such.kernel"])
def test_what_cannot_stand_in_for_a_kernel_does_not(stand_in: str, snapshot: Snapshot) -> None:
    """One cannot take the weight's dtype, the other is not registered: the default serves in their place."""
    taken = spec("mine.named", "norm.rms", dtypes=("bfloat16",), supports_mixed_weight_dtype=True, traced_as=stand_in)
    with registered(taken, norm), compiled(lz.rms_norm) as (traced, graphs):
        traced(rows(6, 24).bfloat16(), rows(24))
    assert graphs.functions() == [TRACED["torch.rms_norm"]]
