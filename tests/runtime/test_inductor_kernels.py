"""What makes compiled kernels safe to call without Dynamo's guards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import fresh_cache, run_and_get_code

from layerzero_runtime.errors import KernelExecutionError
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.kernels.torch_inductor import _compile
from layerzero_runtime.operations import OPERATIONS
from tests.runtime.kernel_calls import KERNELS, Call, plain_call, tensor


@pytest.fixture(scope="module")
def compiled_rms() -> tuple[Kernel, Call]:
    return KERNELS["torch.inductor.rms_norm"], plain_call("norm.rms", "float32")


@settings(deadline=None)
@given(rows=st.integers(1, 500), width=st.integers(1, 200), eps=st.floats(1e-8, 1.0))
def test_one_compilation_serves_every_size_and_eps(rows: int, width: int, eps: float) -> None:
    kernel = KERNELS["torch.inductor.rms_norm"]
    arguments = (tensor((rows, width), "float32"), tensor((width,), "float32"), eps, 0.0)
    call = Call(OPERATIONS["norm.rms"].describe(*arguments), arguments)
    (output,) = call.run(kernel)
    torch.testing.assert_close(output, F.rms_norm(arguments[0], (width,), arguments[1], eps))


def test_compiled_function_takes_a_row_of_a_larger_tensor(compiled_rms: tuple[Kernel, Call]) -> None:
    # Contiguous by torch's rule, with the stride of the tensor that it was cut from.
    kernel, call = compiled_rms
    x = tensor((5, 7, 129), "float32")[2:3, -1, :]
    assert x.is_contiguous()
    assert x.stride() != (129, 1)
    (output,) = Call(call.context, (x, *call.arguments[1:])).run(kernel)
    torch.testing.assert_close(output, F.rms_norm(x, (129,), call.arguments[1], 1e-6))


def test_compiled_function_refuses_strides_that_its_limits_exclude(compiled_rms: tuple[Kernel, Call]) -> None:
    kernel, call = compiled_rms
    with pytest.raises(AssertionError, match="stride"):
        Call(call.context, (tensor((129, 33), "float32").t(), *call.arguments[1:])).run(kernel)


def test_compiled_function_takes_parameters_where_no_gradient_is_recorded(compiled_rms: tuple[Kernel, Call]) -> None:
    kernel, call = compiled_rms
    x, weight, *rest = call.arguments
    with torch.no_grad():
        (output,) = Call(call.context, (x, torch.nn.Parameter(weight), *rest)).run(kernel)
    assert not output.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(call.run(kernel)[0], output)


@pytest.mark.parametrize("example", [(2, 3), (2048, 4096)])
def test_loops_are_compiled_serial_and_parallel_whatever_the_example(example: tuple[int, int]) -> None:
    # By default Inductor would decide from the example's sizes, and from any cached code for the same graph.
    with fresh_cache():
        _, codes = run_and_get_code(lambda: _compile(doubled, torch.empty(example)))
    assert ["#pragma omp parallel" in code for code in codes] == [False, True]


@pytest.mark.parametrize("kernel_id", [kernel_id for kernel_id in KERNELS if kernel_id.startswith("torch.inductor")])
def test_serial_and_parallel_code_give_equal_bits(kernel_id: str) -> None:
    # 33 x 129 elements are computed serially, 33 times as many in parallel.
    kernel = KERNELS[kernel_id]
    call = plain_call(kernel.spec.operations[0], "bfloat16")
    repeated = tuple(a.repeat(33, 1) if isinstance(a, torch.Tensor) and a.dim() == 2 else a for a in call.arguments)
    for few, many in zip(call.run(kernel), Call(call.context, repeated).run(kernel), strict=True):
        assert torch.equal(many, few.repeat(33, 1))


def test_the_number_of_threads_changes_no_bit(compiled_rms: tuple[Kernel, Call]) -> None:
    kernel, call = compiled_rms
    x = tensor((512, 129), "float32")
    call = Call(call.context, (x, *call.arguments[1:]))
    threads = torch.get_num_threads()
    (expected,) = call.run(kernel)
    try:
        torch.set_num_threads(1)
        (output,) = call.run(kernel)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(output, expected)


def doubled(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x * 2,)


def doubled_if_tall(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x * 2 if x.shape[0] > 7 else x + 1,)


def doubled_if_wide(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x * 2 if x.shape[0] < x.shape[1] else x + 1,)


@pytest.mark.parametrize("function", [doubled_if_tall, doubled_if_wide])
def test_code_for_some_sizes_only_is_refused(function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> None:
    with pytest.raises(KernelExecutionError, match=f"specialised {function.__name__} to"):
        _compile(function, torch.empty(64, 128))
