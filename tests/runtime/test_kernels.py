"""Every built-in kernel against the references: values, gradients, limits, and what loading it does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from _pytest.mark.structures import ParameterSet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerzero_runtime.errors import ContextError
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.selection.limits import rejections
from tests.runtime.kernel_calls import (
    KERNELS,
    Call,
    allowed_error,
    assert_close_to_reference,
    calls,
    plain_call,
    relative_error,
)

ALL_PAIRS = [(kernel, operation) for kernel in KERNELS.values() for operation in kernel.spec.operations]
# Those of other devices have tests of their own.
PAIRS = [(kernel, operation) for kernel, operation in ALL_PAIRS if "cpu" in kernel.spec.platforms]
# torch has no derivative of quantised products.
BACKWARD_PAIRS = [
    (kernel, operation)
    for kernel, operation in PAIRS
    if kernel.spec.supports_backward and not operation.startswith("linear")
]
# Reproducible, so that a comparison of two rounding errors cannot fail by chance on another day.
FIXED = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Thousands of tiny calls: waiting for a second thread on a busy machine would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def named(pairs: list[tuple[Kernel, str]]) -> list[ParameterSet]:
    return [pytest.param(kernel, operation, id=f"{kernel.kernel_id}-{operation}") for kernel, operation in pairs]


def named_with_dtypes(pairs: list[tuple[Kernel, str]], dtypes: tuple[str, ...]) -> list[ParameterSet]:
    """With each of these dtypes, or with those of a kernel that has none of them."""
    return [
        pytest.param(kernel, operation, dtype, id=f"{kernel.kernel_id}-{operation}-{dtype}")
        for kernel, operation in pairs
        for dtype in (dtypes if set(dtypes).intersection(kernel.spec.dtypes) else kernel.spec.dtypes)
    ]


@pytest.mark.parametrize(("kernel", "operation", "dtype"), named_with_dtypes(PAIRS, ("float32", "bfloat16")))
def test_accepted_calls_agree_with_the_reference(kernel: Kernel, operation: str, dtype: str) -> None:
    @FIXED
    @given(calls(operation, dtype).filter(lambda call: call.accepts(kernel)))
    def agrees(call: Call) -> None:
        assert_close_to_reference(call, kernel)

    agrees()


@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_the_default_accepts_every_call(operation: str) -> None:
    default = KERNELS[OPERATIONS[operation].default_kernel]

    @FIXED
    @given(calls(operation, "bfloat16" if "bfloat16" in default.spec.dtypes else default.spec.dtypes[0]), st.booleans())
    def accepts(call: Call, gradients_needed: bool) -> None:
        call = call.with_gradients() if gradients_needed else call
        assert call.accepts(call.default())

    accepts()


@pytest.mark.parametrize(("kernel", "operation"), named(PAIRS))
def test_every_declared_dtype_works(kernel: Kernel, operation: str) -> None:
    for dtype in kernel.spec.dtypes:
        call = plain_call(operation, dtype, group=2)
        if operation == "attention.causal" and not call.accepts(kernel):
            call = plain_call(operation, dtype, group=2, length_k=70, alignment="bottom_right")
        assert call.accepts(kernel)
        assert_close_to_reference(call, kernel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kernel", "operation"), named(BACKWARD_PAIRS))
def test_gradients_agree_with_the_reference(kernel: Kernel, operation: str, dtype: str) -> None:
    @settings(FIXED, max_examples=10)
    @given(calls(operation, dtype).map(Call.with_gradients).filter(lambda call: call.accepts(kernel)))
    def agrees(call: Call) -> None:
        expected, reference = gradients(call, call.run(call.default())), gradients(call, call.reference())
        allowed = allowed_error(call, expected, reference)
        assert relative_error(gradients(call, call.run(kernel)), reference) <= allowed

    agrees()


def gradients(call: Call, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Gradients of a fixed random projection of the outputs."""
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in outputs]
    products = [output.double() * direction for output, direction in zip(outputs, directions, strict=True)]
    loss = torch.cat([product.flatten() for product in products]).sum()
    leaves = [argument for argument in call.arguments if isinstance(argument, torch.Tensor)]
    # All together: a gradient that is zero in theory (of a softmax over one key) has no relative error of its own.
    return (torch.cat([gradient.double().flatten() for gradient in torch.autograd.grad(loss, leaves)]),)


def test_kernel_ids_are_unique_and_begin_with_the_library() -> None:
    ids = [kernel.kernel_id for kernel, _ in ALL_PAIRS]
    assert len(set(ids)) == len(KERNELS)
    # Some distributions have a longer name than their module.
    libraries = {kernel_id: KERNELS[kernel_id].spec.library.replace("-", "_") for kernel_id in ids}
    assert all(library.startswith(kernel_id.split(".")[0]) for kernel_id, library in libraries.items())


@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_operations_have_a_default_that_goes_first_and_enough_competitors(operation: str) -> None:
    competitors = [kernel for kernel, name in ALL_PAIRS if name == operation]
    default = KERNELS[OPERATIONS[operation].default_kernel]
    assert all(kernel.spec.priority < default.spec.priority for kernel in competitors if kernel is not default)
    assert len(competitors) >= (3 if operation.startswith("attention") else 2)


def test_listing_the_kernels_imports_no_library() -> None:
    code = (
        "import sys; from layerzero_runtime.kernels import builtin_kernels; builtin_kernels();"
        "print([name for name in ('torch', 'triton', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What the default alone serves.


@pytest.mark.parametrize("operation", ["attention.full", "attention.cross"])
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_sdpa_applies_a_mask(operation: str, mask: str) -> None:
    call = plain_call(operation, "float32")
    keep = torch.rand(33, call.arguments[1].shape[2]) < 0.7
    keep[:, 0] = True
    attn_mask = keep if mask == "bool" else torch.randn(keep.shape)
    arguments = (*call.arguments[:3], attn_mask, *call.arguments[4:])
    masked = Call(OPERATIONS[operation].describe(*arguments), arguments)
    assert masked.context.attn_mask == mask
    assert_close_to_reference(masked, KERNELS["torch.sdpa"])
    assert not any(masked.accepts(kernel) for kernel in KERNELS.values() if kernel.kernel_id != "torch.sdpa")


def test_sdpa_passes_a_mask_beside_is_causal_on_to_torch() -> None:
    call = plain_call("attention.causal", "float32")
    mask = torch.ones(33, 33, dtype=torch.bool)
    function = KERNELS["torch.sdpa"].load(call.context, {})
    query, key, value = call.arguments[:3]
    expected = F.scaled_dot_product_attention(query, key, value, mask, is_causal=True)
    assert torch.equal(function(query, key, value, mask, 0.0, None), expected)
    with pytest.raises(RuntimeError, match="is_causal"):
        function(query, key, value[..., :8], mask, 0.0, None)


def test_sdpa_refuses_a_mask_beside_a_bottom_right_one() -> None:
    call = plain_call("attention.causal", "float32", length_k=40, alignment="bottom_right")
    function = KERNELS["torch.sdpa"].load(call.context, {})
    with pytest.raises(ContextError, match="bottom-right"):
        function(*call.arguments[:3], torch.ones(33, 40, dtype=torch.bool), 0.0, None)


@pytest.mark.parametrize("operation", ["attention.causal", "attention.full", "attention.cross"])
def test_sdpa_drops_weights_as_torch_does(operation: str) -> None:
    call = plain_call(operation, "float32")
    arguments = (*call.arguments[:4], 0.5, None)
    dropping = Call(OPERATIONS[operation].describe(*arguments), arguments)
    torch.manual_seed(1)
    (output,) = dropping.run(KERNELS["torch.sdpa"])
    torch.manual_seed(1)
    query, key, value = call.arguments[:3]
    expected = F.scaled_dot_product_attention(query, key, value, None, 0.5, operation == "attention.causal")
    assert torch.equal(output, expected)
    assert not any(dropping.accepts(kernel) for kernel in KERNELS.values() if kernel.kernel_id != "torch.sdpa")


# Corners of the attention kernels.


@pytest.mark.parametrize("kernel_id", [k.kernel_id for k, o in PAIRS if o == "attention.causal"])
@pytest.mark.parametrize(("length_q", "length_k"), [(9, 2), (300, 7), (300, 290)])
@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")
def test_rows_that_see_no_key_are_zero(kernel_id: str, length_q: int, length_k: int) -> None:
    call = plain_call(
        "attention.causal", "float32", group=2, length_q=length_q, length_k=length_k, alignment="bottom_right"
    )
    assert call.accepts(KERNELS[kernel_id])
    (output,) = call.run(KERNELS[kernel_id])
    assert torch.equal(output[:, :, : length_q - length_k], torch.zeros(2, 4, length_q - length_k, 32))
    assert_close_to_reference(call, KERNELS[kernel_id])


@pytest.mark.parametrize("magnitude", [1.0, 3.0, 6.0])
@pytest.mark.parametrize(("kernel", "operation"), named([p for p in PAIRS if p[1].startswith("attention")]))
def test_large_scores_keep_their_precision(kernel: Kernel, operation: str, magnitude: float) -> None:
    call = plain_call(operation, "bfloat16", group=2, length_q=300, length_k=400, alignment="bottom_right")
    query, key, *rest = call.arguments
    assert_close_to_reference(Call(call.context, (query * magnitude, key * magnitude, *rest)), kernel)


@pytest.mark.parametrize("scale", [0.0, -0.2])
def test_causal_masks_hold_at_scales_that_are_not_positive(scale: float) -> None:
    # Except in SDPA's flash path, which the limits of its binding therefore exclude.
    call = plain_call("attention.causal", "float32")
    arguments = (*call.arguments[:5], scale)
    scaled = Call(OPERATIONS["attention.causal"].describe(*arguments), arguments)
    assert not scaled.accepts(KERNELS["torch.sdpa.flash_cpu"])
    reference = scaled.reference()
    for kernel in (KERNELS["torch.sdpa.math"], KERNELS["torch.matmul.causal"]):
        assert scaled.accepts(kernel)
        assert relative_error(scaled.run(kernel), reference) < 1e-6


def test_nan_in_memory_that_no_result_depends_on_stays_out() -> None:
    # The addend of baddbmm and the rows beyond a slice are never read.
    call = plain_call("attention.causal", "float32", length_q=200, length_k=400, alignment="bottom_right")
    padded = [torch.full((2, 2, 512, 32), torch.nan) for _ in range(3)]
    for room, source in zip(padded, call.arguments, strict=False):
        room[:, :, : source.shape[2]] = source
    views = [room[:, :, : source.shape[2]] for room, source in zip(padded, call.arguments, strict=False)]
    sliced = Call(call.context, (*views, None, 0.0, None))
    for kernel, operation in PAIRS:
        if operation == "attention.causal" and sliced.accepts(kernel):
            assert_close_to_reference(sliced, kernel)


def test_folded_queries_need_a_group() -> None:
    single, grouped = plain_call("attention.full", "float32"), plain_call("attention.full", "float32", group=2)
    spec = KERNELS["torch.sdpa.flash_cpu_folded"].spec
    assert [str(r) for r in rejections(spec.limits, single.context)] == [
        "GQA_GROUP_NOT_AT_LEAST: gqa_group is 1, required >= 2"
    ]
    assert rejections(spec.limits, grouped.context) == ()
