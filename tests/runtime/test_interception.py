"""Calls that something else wants to see reach torch's own function, whatever the table says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import layerzero_runtime as lz
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.snapshot import Snapshot
from tests.runtime.call_examples import each_call, qkv
from tests.runtime.kernel_calls import is_floating
from tests.runtime.public_calls import PublicCall, as_outputs


@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_torchs(call: PublicCall, dtype: torch.dtype, served: Snapshot) -> None:
    arguments = [argument.to(dtype) if is_floating(argument) else argument for argument in call.arguments]
    call = call.on(*arguments)
    call.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found, expected in zip(call.run(), call.default(), strict=True):
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@each_call
def test_vmap_and_forward_mode_are_torchs(call: PublicCall, served: Snapshot) -> None:
    call.run()
    tensors = [argument for argument in call.arguments if is_floating(argument)]

    def applied(function: Any) -> Any:
        def on_tensors(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            remaining = iter(given)
            arguments = [next(remaining) if is_floating(argument) else argument for argument in call.arguments]
            return as_outputs(function(call.on(*arguments)))

        return on_tensors

    stacked = [torch.stack([tensor, tensor * 0.5]) for tensor in tensors]
    found, expected = (torch.vmap(applied(f))(*stacked) for f in (PublicCall.run, PublicCall.default))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    if call.operation.name.startswith("attention"):
        return  # torch's own attention has no forward mode on a CPU
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(tensor, torch.ones_like(tensor)) for tensor in tensors]  # type: ignore[no-untyped-call]
        for one, other in zip(applied(PublicCall.run)(*dual), applied(PublicCall.default)(*dual), strict=True):
            tangents = [torch.autograd.forward_ad.unpack_dual(part).tangent for part in (one, other)]  # type: ignore[no-untyped-call]
            assert tangents[0] is not None
            torch.testing.assert_close(tangents[0], tangents[1], rtol=0, atol=0)


class Functions(TorchFunctionMode):
    """Notes what is called, with the keywords that torch's functions were given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.__name__.startswith("__"):
            self.seen.append((func.__name__, (kwargs or {}).get("enable_gqa")))
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func.name(), None))
        return func(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    """A subclass, which stays one through torch's functions."""


# What reads a tensor or changes how it is seen, which our own way of finding out may do too.
READS = {
    "dim",
    "numel",
    "dtype",
    "device",
    "shape",
    "transpose",
    "size",
    "stride",
    "is_contiguous",
    "get_device",
}


@each_call
@pytest.mark.parametrize("make", [Functions, Operators])
def test_modes_see_what_they_see_without_us(
    call: PublicCall, make: type[Functions] | type[Operators], served: Snapshot
) -> None:
    call.run()
    if make is Operators and call.context.causal_mask == "bottom_right":
        pytest.skip("torch cannot make a CausalBias under a dispatch mode")
    with make() as ours:
        found = call.run()
    with make() as torchs:
        expected = call.default()
    ours_seen, torchs_seen = ([entry for entry in mode.seen if entry[0] not in READS] for mode in (ours, torchs))
    assert ours_seen == torchs_seen
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@each_call
def test_subclasses_reach_torch(call: PublicCall, served: Snapshot) -> None:
    call.run()
    arguments = [argument.as_subclass(Marked) if is_floating(argument) else argument for argument in call.arguments]
    before = lz.stats()["intercepted"]
    for one, other in zip(call.on(*arguments).run(), call.default(), strict=True):
        assert type(one) is Marked
        torch.testing.assert_close(one.as_subclass(torch.Tensor), other, rtol=0, atol=0)
    assert lz.stats()["intercepted"] == before + 1


@each_call
def test_parameters_are_no_subclass(call: PublicCall, served: Snapshot) -> None:
    arguments = [torch.nn.Parameter(a, requires_grad=False) if is_floating(a) else a for a in call.arguments]
    before = lz.stats()["intercepted"]
    call.assert_right(call.on(*arguments).run())
    assert lz.stats()["intercepted"] == before


@each_call
def test_devices_that_nothing_is_known_of_are_torchs(call: PublicCall, served: Snapshot) -> None:
    call.run()
    arguments = [argument.to("meta") if is_floating(argument) else argument for argument in call.arguments]
    before = dict(lz.stats()).get("other_devices", 0)
    for one, other in zip(call.on(*arguments).run(), call.default(), strict=True):
        assert (one.device.type, one.shape, one.dtype) == ("meta", other.shape, other.dtype)
    assert lz.stats()["other_devices"] == before + 1


def test_autocast_takes_what_it_would_convert(served: Snapshot) -> None:
    query, key, value = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = lz.attention(query, key.bfloat16(), value.bfloat16(), enable_gqa=True)
    assert output.dtype == torch.bfloat16


def test_nested_tensors_are_torchs(served: Snapshot) -> None:
    parts = [torch.randn(length, 4, 16) for length in (3, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    call = PublicCall(OPERATIONS["attention.full"], (nested, nested, nested, None, 0.0, None), {})
    for one, other in zip(call.run()[0].unbind(), call.default()[0].unbind(), strict=True):
        torch.testing.assert_close(one, other)
