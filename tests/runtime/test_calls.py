"""The public functions, with a table in force and without one: right results, gradients, clear errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings

import layerzero_runtime as lz
from layerzero_runtime.device import detect_device
from layerzero_runtime.errors import ContextError, ContextTypeError, NoKernelAvailableError
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.snapshot import Snapshot
from tests.runtime.call_examples import each_call, qkv, rows
from tests.runtime.kernel_calls import is_floating
from tests.runtime.public_calls import PublicCall, public_calls


@pytest.mark.scenario("NO-032")
@pytest.mark.scenario("NO-033")
@pytest.mark.scenario("NO-010")
@settings(max_examples=50, deadline=None)
@given(call=public_calls())
def test_results_agree_with_the_reference(call: PublicCall, served: Snapshot) -> None:
    for _ in range(2):
        call.assert_right(call.run())


@each_call
def test_every_operation_twice(call: PublicCall, served: Snapshot) -> None:
    call.assert_right(call.run())
    call.assert_right(call.run())


@each_call
def test_calls_that_need_gradients_get_the_defaults(call: PublicCall, served: Snapshot) -> None:
    call.run()  # so that a fast path is there to be taken wrongly

    def gradients(function: Any) -> list[torch.Tensor]:
        arguments = [a.detach().clone().requires_grad_() if is_floating(a) else a for a in call.arguments]
        outputs = function(call.on(*arguments))
        torch.manual_seed(1)
        sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
        return [argument.grad for argument in arguments if is_floating(argument)]

    for found, expected in zip(gradients(PublicCall.run), gradients(PublicCall.default), strict=True):
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@each_call
def test_a_parameter_alone_makes_a_call_need_gradients(call: PublicCall, served: Snapshot) -> None:
    last = max(index for index, argument in enumerate(call.arguments) if is_floating(argument))
    arguments = list(call.arguments)
    arguments[last] = torch.nn.Parameter(arguments[last].clone())
    for output in call.on(*arguments).run()[:1]:
        assert output.requires_grad
    with torch.no_grad():
        assert not any(output.requires_grad for output in call.on(*arguments).run())


@each_call
@pytest.mark.scenario("EC-022")
def test_deterministic_mode_gives_the_default(call: PublicCall, served: Snapshot) -> None:
    call.run()
    misses = lz.stats()["misses"]
    torch.use_deterministic_algorithms(True)
    try:
        found, expected = call.run(), call.default()
    finally:
        torch.use_deterministic_algorithms(False)
    assert lz.stats()["misses"] == misses + 1
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


EMPTY = [(batch, lengths) for batch, lengths in ((0, (3, 5)), (2, (0, 5)), (2, (3, 0)), (2, (0, 0)))]


@pytest.mark.scenario("EC-001")
@pytest.mark.parametrize(("batch", "lengths"), EMPTY)
@pytest.mark.parametrize("features", [{}, {"layout": "bshd"}, {"causal_alignment": "bottom_right"}], ids=str)
def test_empty_attention_is_torchs(
    batch: int, lengths: tuple[int, int], features: dict[str, str], served: Snapshot
) -> None:
    parts = [part[:batch] for part in qkv(*lengths)]
    if "layout" in features:
        parts = [part.transpose(1, 2) for part in parts]
    same = "full" if lengths[0] == lengths[1] else "cross"
    for name in ("attention.causal", f"attention.{same}"):
        call = PublicCall(OPERATIONS[name], (*parts, None, 0.0, None), features)
        [found], [expected] = call.run(), call.default()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.scenario("EC-001")
@each_call
def test_empty_rows_are_torchs(call: PublicCall, served: Snapshot) -> None:
    if call.operation.name.startswith("attention"):
        return
    before = lz.stats()["empty"]
    for found, expected in zip(
        call.on(*(a[:0] if is_floating(a) and a.dim() == 2 else a for a in call.arguments)).run(),
        call.on(*(a[:0] if is_floating(a) and a.dim() == 2 else a for a in call.arguments)).default(),
        strict=True,
    ):
        assert found.shape == expected.shape == (0, 128)
    assert lz.stats()["empty"] == before + 1


@pytest.mark.scenario("EC-016")
@each_call
def test_nan_and_inf_do_not_vanish(call: PublicCall, served: Snapshot) -> None:
    arguments = list(call.arguments)
    arguments[0] = arguments[0].clone()
    arguments[0][..., -1:, :] = float("nan")
    for found, expected in zip(call.on(*arguments).run(), call.on(*arguments).default(), strict=True):
        # torch's own flash attention gives zeros where every score is NaN.
        assert bool((found.isnan() | ~expected.isnan()).all())
        finite = ~found.isnan()
        torch.testing.assert_close(found[finite], expected[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.scenario("EC-013")
def test_tensors_that_do_not_fit_together_are_refused(served: Snapshot) -> None:
    x, weight = rows(), rows(128)
    query, key, value = qkv(kv_heads=4)
    before = lz.stats()
    # So that fast paths are there, and with a table hits on them.
    lz.swiglu(x, x), lz.rms_norm(x, weight), lz.attention(query, key, value)
    if served.tables.of(detect_device("cpu")) is not None:
        assert lz.stats()["hits"] == before["hits"] + 3
    cases: tuple[tuple[type[Exception], str, Any, tuple[Any, ...]], ...] = (
        (ContextError, "dtypes differ: gate float32, up float64", lz.swiglu, (x, x.double())),
        (ContextError, "shapes differ", lz.swiglu, (x, x[:4])),
        (ContextError, "different devices: gate cpu, up meta", lz.swiglu, (x, x.to("meta"))),
        (ContextError, "different devices: x cpu, weight meta", lz.rms_norm, (x, weight.to("meta"))),
        (ContextError, r"weight has shape \(64,\), required \(128,\)", lz.rms_norm, (x, weight[:64])),
        (ContextError, "no dimension", lz.swiglu, (x[0, 0], x[0, 0])),
        (ContextError, "no dimension", lz.rms_norm, (x[0, 0], weight[0])),
        (ContextError, "approximate is 'erf', allowed: none, tanh", lz.geglu, (x, x, "erf")),
        (ContextError, "dtypes differ: query float32, key float64", lz.attention, (query, key.double(), value)),
        (ContextError, "different devices: query cpu, key meta", lz.attention, (query, key.to("meta"), value)),
        (ContextError, "shapes do not fit together", lz.attention, (query, key, value[:, :, :4])),
        (ContextError, "query has 3 dimensions, required 4", lz.attention, (query[0], key[0], value[0])),
        (ContextError, "dropout_p is 1.5", lz.attention, (query, key, value, None, 1.5)),
        (ContextTypeError, "key must be a tensor, not NoneType", lz.attention, (query, None, value)),
        (ContextTypeError, "attn_mask must be a tensor, not list", lz.attention, (query, key, value, [True])),
        (ContextTypeError, "x must be a tensor, not ndarray", lz.rms_norm, (x.numpy(), weight)),
        (NoKernelAvailableError, "DTYPE_NOT_ONE_OF: dtype is 'int8'", lz.swiglu, (x.to(torch.int8),) * 2),
    )
    for error, message, function, arguments in cases:
        with pytest.raises(error, match=message):
            function(*arguments)


def test_arguments_of_attention_alone(served: Snapshot) -> None:
    query, key, value = qkv()
    with pytest.raises(ContextError, match="query has 4 heads and key 2; pass enable_gqa=True"):
        lz.attention(query, key, value)
    with pytest.raises(ContextError, match="layout is 'nhd', allowed: bhsd, bshd"):
        lz.attention(query, key, value, enable_gqa=True, layout="nhd")
    with pytest.raises(ContextError, match="causal_alignment is 'left', allowed: top_left, bottom_right"):
        lz.attention(query, key, value, enable_gqa=True, causal_alignment="left")
    mask = torch.rand(8, 8) < 0.8
    mask[:, 0] = True
    for given_mask in (mask, torch.randn(8, 8)):
        call = PublicCall(OPERATIONS["attention.full"], (query, key, value, given_mask, 0.0, None))
        call.assert_right(call.run())
        causal = PublicCall(OPERATIONS["attention.causal"], call.arguments)
        torch.testing.assert_close(causal.run()[0], causal.default()[0], rtol=0, atol=0)


@pytest.mark.scenario("EC-023")
def test_dropout_is_torchs(served: Snapshot) -> None:
    call = PublicCall(OPERATIONS["attention.full"], (*qkv(), None, 0.5, None))
    call.on(*call.arguments[:4], 0.0, None).run()
    torch.manual_seed(3)
    found = call.run()[0]
    torch.manual_seed(3)
    expected = call.default()[0]
    assert torch.equal(found, expected)
    assert not torch.equal(found, call.run()[0])


def test_a_quantised_kernel_serves_only_where_it_is_asked_for() -> None:
    query = torch.randn(1, 2, 8, 16)
    spec = lz.KernelSpec(
        kernel_id="test.int8",
        operations=("attention.full",),
        platforms=("cpu",),
        dtypes=("float32",),
        quant_formats=("int8",),
        library="test",
        requires=(),
        priority=1000,
    )
    with pytest.raises(NoKernelAvailableError, match="QUANT_FORMAT_NOT_ONE_OF"):
        lz.attention(query, query, query, quant_format="int8")
    lz.register_kernel(spec, lambda query, *rest: torch.zeros_like(query))
    try:
        assert not lz.attention(query, query, query, quant_format="int8").any()
        assert lz.attention(query, query, query).any()
    finally:
        lz.unregister_kernel("test.int8")
