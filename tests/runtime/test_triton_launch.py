"""Launches by handles, with stand-ins for what a CUDA device would have compiled and started."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

import layerzero_runtime as lz
from layerzero_runtime.kernels import triton_launch
from layerzero_runtime.kernels.triton_launch import TritonForm
from tests.runtime.triton_calls import row_context

STREAM = 77
HERE = -1  # what a tensor of the CPU says that its device is


class Compiled:
    """What Triton's compiler gives for one form of a kernel; its launcher counts its arguments, as Triton's does."""

    def __init__(self, name: str, arguments: tuple[Any, ...], started: list[tuple[Any, ...]]) -> None:
        self.function = f"function of {name}"
        self.packed_metadata = f"metadata of {name}"
        self.loaded = False
        self._parameters = len(arguments)
        self._started = started

    @property
    def run(self) -> Callable[..., None]:
        self.loaded = True
        return self._run

    def _run(self, x: int, y: int, z: int, stream: int, function: str, metadata: str, *rest: Any) -> None:
        if len(rest) != 3 + self._parameters:
            raise TypeError(f"function takes exactly {9 + self._parameters} arguments ({6 + len(rest)} given)")
        if x:
            self._started.append(((x, y, z), stream, function, metadata, rest[:3], rest[3:]))


class Jitted(JITFunction[Any]):  # type: ignore[misc]
    """A kernel of two tensors, a stride, a count and a number that is compiled by a stand-in."""

    def __init__(self, extra_parameters: int = 0) -> None:
        self.started: list[tuple[Any, ...]] = []
        self.examples: dict[str, tuple[Any, ...]] = {}
        self.plain: list[tuple[Any, ...]] = []
        self._extra = extra_parameters

    def warmup(self, *arguments: Any, grid: tuple[int, ...], BLOCK: int, **options: Any) -> Any:  # noqa: N803
        name = "aligned" if arguments[3] == 16 else "any"
        self.examples[name] = arguments
        return Compiled(name, (*arguments, BLOCK, *range(self._extra)), self.started)

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: self.plain.append((grid, arguments, options))


def form_of(kernel: Jitted, absent: bool = False) -> TritonForm:
    return TritonForm(
        kernel,
        pointers=(torch.float32, None if absent else torch.float16, torch.float32),
        divisible=2,
        numbers=(int, float),
        constants={"BLOCK": 128},
        num_warps=4,
    )


@contextmanager
def _on(entered: list[Any], index: Any) -> Iterator[None]:
    entered.append(index)
    yield


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The devices that were made current."""
    found: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda index: _on(found, index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: HERE)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: HERE, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    return found


CONTEXT = row_context("norm.rms", "float32", 1, 16)


def test_both_forms_are_compiled_and_loaded_when_a_kernel_is_loaded(entered: list[Any]) -> None:
    kernel = Jitted()
    form_of(kernel).launcher(CONTEXT)
    assert kernel.started == []
    for name, is_aligned in (("aligned", True), ("any", False)):
        first, second, third, stride, width, count, number = kernel.examples[name]
        assert [part.dtype for part in (first, second, third)] == [torch.float32, torch.float16, torch.float32]
        assert all((part.data_ptr() % 16 == 0) == is_aligned for part in (first, second, third))
        assert (stride % 16 == 0) == (width % 16 == 0) == is_aligned
        # No count is one for which Triton would compile other code.
        assert count % 16
        assert count != 1
        assert isinstance(number, float)


def test_a_call_starts_the_form_that_fits_all_of_its_addresses_and_strides(entered: list[Any]) -> None:
    kernel = Jitted()
    launch = form_of(kernel).launcher(CONTEXT)
    entered.clear()
    x, y, z = torch.zeros(64), torch.zeros(64, dtype=torch.float16), torch.zeros(64)
    calls = [
        ((x, y, z), (64, 16), "aligned"),
        ((x[1:], y, z), (64, 16), "any"),
        ((x, y[3:], z), (64, 16), "any"),
        ((x, y, z[4:]), (64, 16), "aligned"),
        ((x, y, z), (64, 40), "any"),
        ((x, y, z), (1, 16), "any"),
    ]
    for tensors, strides, _ in calls:
        launch(5, tensors, strides, (3, 0.5))
    for (tensors, strides, name), started in zip(calls, kernel.started, strict=True):
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        assert started == (
            (5, 1, 1),
            STREAM,
            f"function of {name}",
            f"metadata of {name}",
            (None, None, None),
            (*addresses, *strides, 3, 0.5, 128),
        )
    assert kernel.plain == []
    assert entered == [], "a launch on the current device makes none current"


def test_a_tensor_that_calls_do_not_have_keeps_its_place(entered: list[Any]) -> None:
    kernel = Jitted()
    launch = form_of(kernel, absent=True).launcher(CONTEXT)
    x, z = torch.zeros(64), torch.zeros(64)
    launch(1, (x, z), (64, 16), (3, 0.5))
    assert kernel.started[0][-1][:3] == (x.data_ptr(), None, z.data_ptr())


def test_a_device_that_is_not_the_current_one_is_made_it_and_ready_once(
    entered: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Jitted()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    launch = form_of(kernel).launcher(CONTEXT)
    kernel.examples.clear()
    entered.clear()
    tensors = torch.zeros(64), torch.zeros(64, dtype=torch.float16), torch.zeros(64)
    launch(1, tensors, (64, 16), (3, 0.5))
    assert entered == [HERE]
    assert kernel.examples.keys() == {"aligned", "any"}
    kernel.examples.clear()
    launch(1, tensors, (64, 16), (3, 0.5))
    assert kernel.examples == {}
    assert len(kernel.started) == 2


def test_handles_that_take_other_arguments_leave_launches_to_triton_and_say_so_once(
    entered: list[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_launch, "_warned", False)
    before = lz.stats().get("triton_plain_launches", 0)
    kernels = [Jitted(extra_parameters=2), Jitted(extra_parameters=2)]
    with caplog.at_level(logging.WARNING, logger="layerzero"):
        launches = [form_of(kernel).launcher(CONTEXT) for kernel in kernels]
    assert len(caplog.records) == 1
    assert "takes exactly 19 arguments (17 given)" in caplog.text
    assert lz.stats()["triton_plain_launches"] == before + 2
    tensors = torch.zeros(64), torch.zeros(64, dtype=torch.float16), torch.zeros(64)
    launches[0](5, tensors, (64, 16), (3, 0.5))
    options = {"BLOCK": 128, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    assert kernels[0].plain == [((5,), (*tensors, 64, 16, 3, 0.5), options)]
    assert kernels[0].started == []


def test_what_the_compiler_refuses_is_raised(entered: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> SimpleNamespace:
        raise TypeError("unsupported")

    kernel = Jitted()
    monkeypatch.setattr(kernel, "warmup", refuse, raising=False)
    with pytest.raises(TypeError, match="unsupported"):
        form_of(kernel).launcher(CONTEXT)
