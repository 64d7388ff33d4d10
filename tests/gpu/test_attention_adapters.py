"""Attention kernels of torch and of other libraries on a CUDA device: right inside their limits, and what is beyond.

Libraries that are not installed are skipped, with what would install them. `pytest -s` shows what lies just outside the
limits: a limit that refuses calls which the library serves is no failure, but listed. Whatever compiles is tried at few
points: FlashAttention-4 takes 5 s for each head dimension, group and mask, FlashInfer up to 97 s for a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _pytest.mark.structures import ParameterSet

import layerzero_runtime as lz
from layerzero_runtime.device import detect_device
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.libraries import missing_requirement, unfit_version
from layerzero_runtime.policies.policy import Rule
from layerzero_runtime.selection.limits import rejections
from layerzero_runtime.selection.transforms import apply_transforms
from tests.gpu.attention_points import (
    ALLOWED,
    ALLOWED_OF_INT8,
    CAUSAL,
    CROSS,
    FEW,
    FULL,
    Sizes,
    described,
    drawn,
    error_of,
    function_of,
    points,
)
from tests.runtime.attention_adapters import ADAPTERS, quant_format

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pairs() -> list[ParameterSet]:
    return [
        pytest.param(kernel, operation, id=f"{kernel.kernel_id}-{operation}")
        for kernel in ADAPTERS.values()
        for operation in kernel.spec.operations
    ]


each_pair = pytest.mark.parametrize(("kernel", "operation"), pairs())


@pytest.fixture(autouse=True)
def _is_here(request: pytest.FixtureRequest) -> None:
    kernel = request.node.callspec.params.get("kernel") if hasattr(request.node, "callspec") else None
    if isinstance(kernel, Kernel):
        skip_unless_here(kernel)


@pytest.fixture(autouse=True)
def _no_plain_calls() -> Iterator[None]:
    """Prepared launches are what is tried here: an adapter that does not know its library's version says so."""
    names = ("flash_attn_4_plain_calls", "flashinfer_plain_calls")
    before = [lz.stats().get(name, 0) for name in names]
    yield
    assert [lz.stats().get(name, 0) for name in names] == before


def skip_unless_here(kernel: Kernel) -> None:
    spec = kernel.spec
    reason = missing_requirement(spec.requires) or unfit_version(spec.library, spec.min_version)
    if reason is not None:
        pytest.skip(reason)
    capability = detect_device("cuda").compute_capability or (0, 0)
    if capability < (spec.min_sm or capability) or capability > (spec.max_sm or capability):
        pytest.skip(f"{kernel.kernel_id} is not for compute capability {capability}")


def check(
    kernel: Kernel, operation: str, sizes: Sizes, dtype: str, layout: str, placement: str, alignment: str
) -> str | None:
    """What is wrong, "" where nothing is, None where the kernel refuses the call."""
    tensors = drawn(sizes, dtype, layout, placement)
    context = described(
        operation, tensors, layout=layout, causal_alignment=alignment, quant_format=quant_format(kernel)
    )
    if rejections(kernel.spec.limits, context):
        return None
    before = [part.clone() for part in tensors]
    try:
        output = function_of(kernel, context)(*tensors, None, 0.0, None)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - all that goes wrong is listed
        return f"{sizes} {dtype} {layout} {placement} {alignment}: {type(error).__name__}: {str(error)[:300]}"
    error_found = error_of(output, context, tensors)
    allowed = ALLOWED_OF_INT8 if quant_format(kernel) else ALLOWED[dtype]
    if not error_found < allowed:
        return f"{sizes} {dtype} {layout} {placement} {alignment}: error {error_found:.2e}, allowed {allowed:.1e}"
    if not all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True)):
        return f"{sizes} {dtype} {layout} {placement} {alignment}: writes to its inputs"
    return ""


@each_pair
def test_calls_inside_the_limits_are_right(kernel: Kernel, operation: str) -> None:
    found = [check(kernel, operation, *point) for point in points(kernel, operation)]
    served = [fault for fault in found if fault is not None]
    faults = [fault for fault in served if fault]
    print(f"\n{kernel.kernel_id} {operation}: {len(faults)} of {len(served)} wrong")
    assert served
    assert faults == []


@each_pair
@pytest.mark.parametrize("placement", ["sliced", "moved", "expanded"])
def test_tensors_that_cannot_be_loaded_in_vectors_are_right(kernel: Kernel, operation: str, placement: str) -> None:
    width, group = FEW.get(kernel.kernel_id, {}).get(operation, ((64, 4),))[0]
    dtype = kernel.spec.dtypes[-1]
    sizes = (1, 2 * group, 2, 64, 320 if operation == CROSS else 64, width)
    tensors = drawn(sizes, dtype, "bhsd", "sliced" if placement == "sliced" else "dense")
    if placement == "moved":
        tensors = [
            torch.empty(part.numel() + 1, dtype=part.dtype, device="cuda")[1:].view(part.shape).copy_(part)
            for part in tensors
        ]
    elif placement == "expanded":
        tensors = [tensors[0], *(part[:, :1].expand(part.shape) for part in tensors[1:])]
    context = described(operation, tensors, causal_alignment="bottom_right", quant_format=quant_format(kernel))
    if rejected := rejections(kernel.spec.limits, context):
        pytest.skip(str(rejected[0]))
    output = function_of(kernel, context)(*tensors, None, 0.0, None)
    torch.cuda.synchronize()
    allowed = ALLOWED_OF_INT8 if quant_format(kernel) else ALLOWED[dtype]
    assert error_of(output, context, tensors) < allowed


@each_pair
def test_another_scale_is_the_callers(kernel: Kernel, operation: str) -> None:
    width, group = FEW.get(kernel.kernel_id, {}).get(operation, ((64, 4),))[0]
    sizes = (1, 2 * group, 2, 64, 128 if operation == CROSS else 64, width)
    tensors = drawn(sizes, kernel.spec.dtypes[-1], "bhsd")
    context = described(operation, tensors, causal_alignment="bottom_right", quant_format=quant_format(kernel))
    assert not rejections(kernel.spec.limits, context)
    output = function_of(kernel, context)(*tensors, None, 0.0, 0.3)
    allowed = ALLOWED_OF_INT8 if quant_format(kernel) else ALLOWED[kernel.spec.dtypes[-1]]
    assert error_of(output, context, tensors, 0.3) < 2 * allowed


def test_values_of_another_head_dimension_are_right_in_memory_efficient_attention() -> None:
    kernel = ADAPTERS["torch.sdpa.efficient"]
    for operation, alignment in ((CAUSAL, "bottom_right"), (CAUSAL, "top_left"), (CROSS, "top_left")):
        tensors = drawn((3, 8, 2, 70, 130, 128), "bfloat16", "bhsd", value_dim=64)
        context = described(operation, tensors, causal_alignment=alignment)
        assert not rejections(kernel.spec.limits, context)
        output = function_of(kernel, context)(*tensors, None, 0.0, None)
        assert error_of(output, context, tensors) < ALLOWED["bfloat16"]


@each_pair
def test_a_captured_call_replays_on_new_values(kernel: Kernel, operation: str) -> None:
    width, group = FEW.get(kernel.kernel_id, {}).get(operation, ((64, 4),))[0]
    sizes = (1, 2 * group, 2, 64, 256 if operation == CROSS else 64, width)
    tensors = drawn(sizes, kernel.spec.dtypes[-1], "bhsd")
    context = described(operation, tensors, causal_alignment="bottom_right", quant_format=quant_format(kernel))
    function = function_of(kernel, context)
    # As warm-up does.
    function(*tensors, None, 0.0, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        output = function(*tensors, None, 0.0, None)
    allowed = ALLOWED_OF_INT8 if quant_format(kernel) else ALLOWED[kernel.spec.dtypes[-1]]
    for _ in range(2):
        for part in tensors:
            part.copy_(torch.randn_like(part))
        graph.replay()
        torch.cuda.synchronize()
        assert error_of(output, context, tensors) < allowed


def test_keys_further_apart_than_32_bits_count_are_read_to_their_end() -> None:
    rows, stride, width = 40, 2**26, 128
    room = torch.empty(rows, stride, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(1, 2, 1, width, device="cuda", dtype=torch.bfloat16)
    key, value = room[None, None, :, :width], room[None, None, :, width : 2 * width]
    key.normal_()
    value.normal_()
    tensors = [query, key, value]
    context = described(CROSS, tensors)
    errors = {}
    for kernel_id, kernel in ADAPTERS.items():
        if CROSS not in kernel.spec.operations or rejections(kernel.spec.limits, context):
            continue
        if missing_requirement(kernel.spec.requires) is None:
            errors[kernel_id] = error_of(function_of(kernel, context)(*tensors, None, 0.0, None), context, tensors)
    print(f"\nkeys 2^26 elements apart: {errors}")
    assert {kernel_id: error for kernel_id, error in errors.items() if not error < ALLOWED["bfloat16"]} == {}


@pytest.mark.parametrize("kernel", [pytest.param(ADAPTERS["flash_attn_4.forward"], id="flash_attn_4.forward")])
def test_a_prepared_launch_serves_public_calls(kernel: Kernel) -> None:
    query = torch.randn(2, 8, 300, 128, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(2, 1, 500, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "causal_alignment": "bottom_right"}
    right = lz.attention(query, key, value, **options)
    context = lz.SelectionContext.from_tensors(
        CAUSAL, query, key, value, None, 0.0, None, causal_alignment="bottom_right"
    )
    try:
        lz.set_policy(lz.Policy(locks=(Rule(kernel=kernel.kernel_id),)))
        assert [plan.kernel_id for plan in lz.warmup([context])] == [kernel.kernel_id]
        for _ in range(4):
            torch.testing.assert_close(lz.attention(query, key, value, **options), right, rtol=2e-2, atol=2e-2)
    finally:
        lz.set_policy(None)
    assert kernel.kernel_id not in lz.stats().broken


# Just outside of what is declared: (operation, sizes, dtype, layout of memory, alignment, what is outside).
OUTSIDE: dict[str, tuple[tuple[str, Sizes, str, str, str], ...]] = {
    "torch.sdpa.flash": (
        (FULL, (1, 4, 2, 64, 64, 264), "bfloat16", "bottom_right", "head_dim 264"),
        (FULL, (1, 4, 2, 64, 64, 68), "bfloat16", "bottom_right", "head_dim 68"),
        (FULL, (1, 4, 2, 64, 64, 64), "float32", "bottom_right", "float32"),
        (CAUSAL, (1, 4, 2, 64, 128, 64), "bfloat16", "top_left", "top-left mask over more keys"),
    ),
    "torch.sdpa.cudnn": (
        (FULL, (1, 4, 2, 64, 64, 264), "bfloat16", "bottom_right", "head_dim 264"),
        (FULL, (1, 4, 2, 64, 64, 68), "bfloat16", "bottom_right", "head_dim 68"),
        (CROSS, (1, 4, 2, 64, 1, 64), "bfloat16", "bottom_right", "one key"),
        (FULL, (1, 4, 2, 64, 64, 64), "float32", "bottom_right", "float32"),
        (CAUSAL, (1, 4, 2, 64, 128, 64), "bfloat16", "bottom_right", "bottom-right mask over more keys"),
    ),
    "torch.sdpa.efficient": (
        (FULL, (1, 4, 2, 64, 64, 68), "bfloat16", "bottom_right", "head_dim 68"),
        (FULL, (1, 4, 2, 64, 64, 64), "float64", "bottom_right", "float64"),
        (FULL, (65536, 2, 1, 2, 2, 8), "float16", "bottom_right", "65536 batches"),
    ),
    "flash_attn_4.forward": (
        (FULL, (1, 2, 1, 64, 64, 264), "bfloat16", "bottom_right", "head_dim 264"),
        (FULL, (1, 2, 1, 64, 64, 68), "bfloat16", "bottom_right", "head_dim 68"),
        (FULL, (1, 2, 1, 64, 64, 64), "float32", "bottom_right", "float32"),
    ),
    "flash_attn_3.forward": ((FULL, (1, 2, 1, 64, 64, 264), "bfloat16", "bottom_right", "head_dim 264"),),
    "flash_attn.forward": ((FULL, (1, 2, 1, 64, 64, 264), "bfloat16", "bottom_right", "head_dim 264"),),
    "xformers.split_k": (
        (FULL, (1, 2, 1, 64, 64, 96), "bfloat16", "bottom_right", "head_dim 96"),
        (FULL, (1, 2, 1, 128, 128, 64), "bfloat16", "bottom_right", "128 queries"),
    ),
    "sageattention.causal": ((CAUSAL, (1, 2, 1, 64, 128, 64), "bfloat16", "bottom_right", "more keys than queries"),),
    "sageattention.full": ((CROSS, (1, 2, 1, 64, 80, 64), "bfloat16", "bottom_right", "a block of 16 keys"),),
}


@pytest.mark.parametrize(
    "kernel", [pytest.param(ADAPTERS[kernel_id], id=kernel_id) for kernel_id in OUTSIDE if kernel_id in ADAPTERS]
)
def test_what_lies_outside_the_limits_fails_or_is_listed(kernel: Kernel) -> None:
    """The last test, since an error of the device would be that of all behind it."""
    for operation, sizes, dtype, alignment, what in OUTSIDE[kernel.kernel_id]:
        tensors = drawn(sizes, dtype, "bhsd")
        context = described(operation, tensors, causal_alignment=alignment, quant_format=quant_format(kernel))
        assert rejections(kernel.spec.limits, context), f"{what} is inside"
        try:
            function = apply_transforms(kernel.load(context, {}), kernel.spec, context)
            output = function(*tensors, None, 0.0, None)
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - that it fails is what is asked
            print(f"\n{kernel.kernel_id}, {what}: fails: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
            continue
        found = error_of(output, context, tensors)
        allowed = ALLOWED_OF_INT8 if quant_format(kernel) else ALLOWED.get(dtype, 1e-12)
        print(
            f"\n{kernel.kernel_id}, {what}: {'RIGHT, the limit is too strict' if found < allowed else 'wrong'}", end=""
        )
        print(f" (error {found:.2e})")
