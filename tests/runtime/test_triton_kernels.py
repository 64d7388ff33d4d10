"""The Triton kernels against the references: on a CUDA device where there is one, else under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.kernels import triton_attention, triton_norm
from layerzero_runtime.kernels.triton_sources import norm as sources
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.selection.limits import rejections
from tests.runtime.kernel_calls import Call, assert_close_to_reference, calls, relative_error
from tests.runtime.test_kernels import named, named_with_dtypes
from tests.runtime.triton_calls import (
    DEVICE,
    IS_INTERPRETED,
    PAIRS,
    SMALL,
    SMALL_GPU,
    TRITON_KERNELS,
    any_size,
    attention_context,
    bfloat16_as_on_a_device,
    call_of,
    configurations,
    device,
    fault,
    in_small_tiles,
    linear_context,
    moved,
    row_context,
    spread,
)

# Of the interpreter, which computes with numpy, and of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
]
DTYPES = ("float32", "float16", "bfloat16")
ROW_PAIRS = [pair for pair in PAIRS if pair[1].startswith(("norm", "mlp"))]
SPLIT_KV = TRITON_KERNELS["triton.split_kv"]
# (rows, width): a row, widths below and above every block of the defaults and between multiples of 16.
ROW_SIZES = ((1, 7), (3, 1000), (17, 130), (2, 4099), (1, 16391))
# (batch, heads, key/value heads, queries, keys, head_dim)
# ((rows, in_features, out_features), features): a row, one tile and several, sizes between multiples of 16.
LINEAR_CALLS: tuple[tuple[tuple[int, int, int], dict[str, Any]], ...] = (
    ((1, 320, 48), {}),
    ((37, 200, 131), {"scale_x": "row", "scale_w": "row", "has_bias": True}),
    ((130, 77, 7), {"scale_x": "row"}),
    ((5, 1000, 260), {"scale_w": "row", "has_bias": True}),
)
ATTENTION_SIZES = ((1, 4, 4, 1, 33, 64), (2, 6, 2, 3, 161, 40), (1, 16, 1, 2, 90, 128), (1, 1, 1, 33, 47, 256))


@pytest.fixture(autouse=True, scope="module")
def _as_on_a_device() -> Iterator[None]:
    """And with one thread: waiting for a second one on a busy machine would take longer than all else."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with bfloat16_as_on_a_device():
        yield
    torch.set_num_threads(threads)


def sized_contexts(operation: str, dtype: str) -> list[SelectionContext]:
    if operation.startswith("attention"):
        return [attention_context(operation, dtype, sizes) for sizes in ATTENTION_SIZES]
    if operation.startswith("linear"):
        return [linear_context(operation, dtype, sizes, **features) for sizes, features in LINEAR_CALLS]
    return [row_context(operation, dtype, *sizes) for sizes in ROW_SIZES]


@pytest.mark.parametrize(("kernel", "operation", "dtype"), named_with_dtypes(PAIRS, DTYPES))
def test_the_tuner_finds_every_configuration_right_at_every_size(kernel: Kernel, operation: str, dtype: str) -> None:
    contexts = sized_contexts(operation, dtype)
    for index, configuration in enumerate(spread(kernel, contexts[0], 4)):
        for context in contexts if not configuration else (contexts[index % len(contexts)],):
            assert fault(kernel, configuration, context) == "", (configuration, context.to_dict())


def is_small(call: Call) -> bool:
    """Whether the interpreter, which takes a ms for each operation of a program, is done with it soon."""
    rows, width = call.context.rows, call.context.hidden_size
    if rows is None or width is None:
        sizes = (rows or 0) * (call.context.out_features or 0)
        return (call.context.score_elements or sizes) <= 4000
    return rows * width <= 8000


@pytest.mark.parametrize(("kernel", "operation", "dtype"), named_with_dtypes(PAIRS, ("float32", "bfloat16")))
def test_accepted_calls_agree_with_the_reference_whatever_their_strides(
    kernel: Kernel, operation: str, dtype: str
) -> None:
    @settings(
        max_examples=6,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )
    @given(calls(operation, dtype).filter(is_small).map(moved).filter(lambda call: call.accepts(kernel)))
    def agrees(call: Call) -> None:
        assert_close_to_reference(call, kernel)
        assert_close_to_reference(call, in_small_tiles(kernel))

    agrees()


def test_small_tiles_are_configurations_of_the_spaces() -> None:
    for kernel, operation in PAIRS:
        assert SMALL[kernel.kernel_id] in list(
            configurations(kernel, any_size(sized_contexts(operation, kernel.spec.dtypes[-1])[0]))
        )


# Norms and activations.


@pytest.mark.parametrize(("kernel", "operation"), named(ROW_PAIRS))
@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (5, 0)])
def test_empty_rows_give_empty_results(kernel: Kernel, operation: str, shape: tuple[int, ...]) -> None:
    x, weight = torch.ones(shape, device=DEVICE), torch.ones(shape[-1], device=DEVICE)
    arguments = {
        "norm.rms": (x, weight, 1e-6, 0.0),
        "norm.add_rms": (x, x, weight, 1e-6),
        "norm.layer": (x, weight, weight, 1e-5),
    }.get(operation, (x, x))
    context = row_context(operation, "float32", 1, 16, has_bias=operation == "norm.layer")
    results = kernel.load(context, {})(*arguments)
    for result in results if isinstance(results, tuple) else (results,):
        assert result.shape == x.shape


@pytest.mark.parametrize(("kernel", "operation"), named(ROW_PAIRS))
def test_results_of_rows_are_dense_whatever_the_strides_are(kernel: Kernel, operation: str) -> None:
    sparse = torch.randn(4, 3, 64, device=DEVICE).transpose(0, 1)[..., ::2].expand(2, 3, 4, 32)
    half = torch.randn(2, 3, 4, 80, device=DEVICE)[..., 5:37]
    weight = torch.randn(64, device=DEVICE)[::2]
    for one, other in ((sparse, half), (half, sparse)):
        check_density(kernel, operation, one, other, weight)


def check_density(kernel: Kernel, operation: str, one: torch.Tensor, other: torch.Tensor, weight: torch.Tensor) -> None:
    arguments = {
        "norm.rms": (one, weight, 1e-6, 0.0),
        "norm.add_rms": (one, other, weight, 1e-6),
        "norm.layer": (one, weight, None, 1e-5),
    }.get(operation, (one, other))
    call = call_of(operation, *arguments)
    assert not call.context.is_contiguous
    outputs = call.run(kernel)
    assert all(output.is_contiguous() for output in outputs)
    assert_close_to_reference(call, kernel)


@pytest.mark.skipif(not IS_INTERPRETED, reason="looks into launches in Triton's own way")
def test_the_smallest_block_and_rest_that_hold_a_row_serve_it() -> None:
    choose = triton_norm.norm_launches(
        sources.rms_norm,
        row_context("norm.rms", "float32", 1, 1),
        {},
        pointers=(torch.float32, torch.float32, None, None, None),
        divisible=3,
        constants={"OFFSET": 0.0},
    )
    # By width: the block, what its half is divided by for the rest, and the programs of 9 rows.
    expected = {
        1: (256, 2, 2),
        192: (256, 2, 2),
        193: (256, 1, 2),
        256: (256, 1, 2),
        257: (1024, 2, 9),
        768: (1024, 2, 9),
        769: (1024, 1, 9),
        5000: (8192, 2, 9),
        9000: (16384, 2, 9),
        99999: (16384, 1, 9),
    }
    for width, (block, share, programs) in expected.items():
        found, launch = choose(9, width)
        constants = launch.__self__.constants  # type: ignore[attr-defined]
        assert (constants["BLOCK"], constants["REST_SHARE"], found) == (block, share, programs), width


@pytest.mark.parametrize("programs", [0, 2])
@pytest.mark.parametrize("operation", ["norm.rms", "norm.add_rms", "norm.layer"])
def test_rows_around_half_a_block_and_its_rests_are_right(operation: str, programs: int) -> None:
    kernel = TRITON_KERNELS[operation.replace("norm.", "triton.") + "_norm"]
    configuration = {**SMALL[kernel.kernel_id], "num_stages": 1, "programs_per_multiprocessor": programs}
    for width in (1, 63, 64, 65, 80, 81, 96, 97, 128, 129):
        context = row_context(operation, "float32", 7, width, has_bias=operation == "norm.layer")
        assert fault(kernel, configuration, context) == "", width


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_whose_weights_are_loaded_late_are_right(dtype: str) -> None:
    kernel = TRITON_KERNELS["triton.layer_norm"]
    for features in ({}, {"has_bias": True}, {"has_weight": False}):
        assert fault(kernel, {}, row_context("norm.layer", dtype, 2, 4500, **features)) == "", features


@pytest.mark.parametrize(
    ("operation", "features"),
    [("mlp.swiglu", {}), ("mlp.geglu", {"approximate": "none"}), ("mlp.geglu", {"approximate": "tanh"})],
)
def test_gates_far_from_zero_are_shut_or_open(operation: str, features: dict[str, str]) -> None:
    gate = torch.tensor([-1e4, -100.0, -10.0, 0.0, 10.0, 100.0, 1e4], device=DEVICE)
    call = call_of(operation, gate, torch.ones_like(gate), **features)
    (output,) = call.run(TRITON_KERNELS[operation.replace("mlp", "triton")])
    torch.testing.assert_close(output.double(), call.reference()[0], rtol=1e-4, atol=1e-7)


# Attention.


@pytest.mark.parametrize("operation", SPLIT_KV.spec.operations)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "length_q"), [(1, 1), (1, 17), (3, 5), (8, 1), (2, 64)])
def test_every_group_and_number_of_queries_agrees(operation: str, dtype: str, group: int, length_q: int) -> None:
    context = attention_context(operation, dtype, (1, 2 * group, 2, length_q, 75, 32))
    for configuration in ({}, SMALL["triton.split_kv"]):
        assert fault(SPLIT_KV, configuration, context) == ""


def test_rows_that_see_no_key_are_zero_in_all_splits() -> None:
    # Of one head the keys are split, of many they are not.
    for heads in (1, 8):
        query, key, value = (torch.randn(1, heads, length, 64, device=DEVICE) for length in (60, 40, 40))
        call = call_of("attention.causal", query, key, value, None, 0.0, None, causal_alignment="bottom_right")
        for kernel in (SPLIT_KV, in_small_tiles(SPLIT_KV)):
            (output,) = call.run(kernel)
            assert torch.equal(output[:, :, :20], torch.zeros(1, heads, 20, 64, device=DEVICE))
            assert_close_to_reference(call, kernel)


@pytest.mark.parametrize("kernel", [SPLIT_KV, in_small_tiles(SPLIT_KV)], ids=["default", "small"])
def test_what_lies_behind_keys_and_values_stays_out(kernel: Kernel) -> None:
    padded = [torch.full((2, 2, 128, 80), torch.nan, dtype=torch.float16, device=DEVICE) for _ in range(3)]
    for tensor, length in zip(padded, (3, 90, 90), strict=True):
        tensor[:, :, :length, :72] = torch.randn(2, 2, length, 72).to(tensor)
    views = [tensor[:, :, :length, :72] for tensor, length in zip(padded, (3, 90, 90), strict=True)]
    for features in ({}, {"causal_alignment": "bottom_right"}):
        operation = "attention.causal" if features else "attention.cross"
        assert_close_to_reference(call_of(operation, *views, None, 0.0, None, **features), kernel)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.5])
def test_any_scale_is_that_of_the_scores(scale: float) -> None:
    query, key, value = (torch.randn(1, 2, length, 48, device=DEVICE) for length in (2, 70, 70))
    for kernel in (SPLIT_KV, in_small_tiles(SPLIT_KV)):
        call = call_of("attention.cross", query, key, value, None, 0.0, scale)
        assert relative_error(call.run(kernel), call.reference()) < 1e-6


@pytest.mark.parametrize("magnitude", [3.0, 6.0])
def test_large_scores_keep_their_precision(magnitude: float) -> None:
    query, key, value = (torch.randn(1, 4, n, 64, device=DEVICE).bfloat16() for n in (4, 300, 300))
    for kernel in (SPLIT_KV, in_small_tiles(SPLIT_KV)):
        call = call_of("attention.cross", query * magnitude, key * magnitude, value, None, 0.0, None)
        assert_close_to_reference(call, kernel)


def test_splits_never_take_more_memory_than_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    new_empty = torch.Tensor.new_empty

    def noted(like: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        made = new_empty(like, *size, **options)
        if made.dtype == torch.float32 and made.nbytes:
            taken.append(made.nbytes)
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", noted)
    context = replace(attention_context("attention.cross", "float16", (1, 2, 2, 1, 800, 64)), device=SMALL_GPU)
    row_bytes = 2 * 65 * 4
    # 3 multiprocessors x 6 programs for 2 heads.
    for room, splits in ((10**6, 9), (5 * row_bytes, 5), (row_bytes, 1), (0, 1)):
        monkeypatch.setattr(triton_attention, "_WORKSPACE_BYTES", room)
        taken.clear()
        assert fault(SPLIT_KV, {**SMALL["triton.split_kv"], "programs_per_multiprocessor": 6}, context) == ""
        assert taken == ([splits * row_bytes] if splits > 1 else [])
    assert SPLIT_KV.spec.workspace_bytes == 64 * 2**20


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seq_len_q": 65}, "SEQ_LEN_Q_NOT_AT_MOST"),
        ({"head_dim": 8}, "HEAD_DIM_NOT_AT_LEAST"),
        ({"head_dim": 264}, "HEAD_DIM_NOT_AT_MOST"),
        ({"v_head_dim": 32}, "OTHER_V_HEAD_DIM_NOT_ONE_OF"),
        ({"attn_mask": "bool"}, "ATTN_MASK_NOT_ONE_OF"),
        ({"dropout_p": 0.1}, "DROPOUT_P_NOT_ONE_OF"),
        ({"dtype": "float64"}, "DTYPE_NOT_ONE_OF"),
        ({"requires_grad": True}, "REQUIRES_GRAD_NOT_ONE_OF"),
        ({"workspace_limit": 2**26 - 1}, "WORKSPACE_LIMIT_NOT_AT_LEAST"),
    ],
)
def test_attention_beyond_its_limits_is_refused(changes: dict[str, Any], reason: str) -> None:
    fields: dict[str, Any] = {"seq_len_q": 64, "head_dim": 64, "dtype": "float16"} | changes
    context = SelectionContext(
        operation="attention.cross",
        batch_size=1,
        num_heads=8,
        num_kv_heads=2,
        seq_len_k=100,
        device=device(),
        **fields,
    )
    assert [rejection.code for rejection in rejections(SPLIT_KV.spec.limits, context)] == [reason]


# Spaces.

USUAL_SIZES: dict[str, list[SelectionContext]] = {
    "norm": [row_context("norm.rms", "bfloat16", rows, 4096) for rows in (1, 64, 8192)],
    "mlp": [row_context("mlp.swiglu", "bfloat16", rows, 14336) for rows in (1, 64, 8192)],
    "linear": [
        linear_context("linear.fp8", "float8_e4m3fn", (rows, *features))
        for rows in (1, 64, 512, 8192)
        for features in ((4096, 14336), (14336, 4096))
    ],
    "attention": [
        attention_context("attention.cross", "bfloat16", (4, 32, 8, length_q, 4096, head_dim))
        for length_q in (1, 4)
        for head_dim in (64, 96, 128, 256)
    ],
}


@pytest.mark.parametrize(("kernel", "operation"), named(PAIRS))
def test_spaces_hold_many_configurations_at_usual_sizes_and_no_idle_ones(kernel: Kernel, operation: str) -> None:
    for usual in USUAL_SIZES[operation.split(".")[0]]:
        context = replace(usual, operation=operation, dtype=kernel.spec.dtypes[-1])
        valid = list(configurations(kernel, context))
        assert 60 <= len(valid) <= 1000, (context.to_dict(), len(valid))
        for configuration in valid:
            assert kernel.space is not None
            assert kernel.space.is_valid(configuration, any_size(context))


def test_tiles_beyond_a_small_call_are_not_tried() -> None:
    norm = TRITON_KERNELS["triton.rms_norm"]
    small = list(configurations(norm, row_context("norm.rms", "bfloat16", 1, 500)))
    assert {found["block_width"] for found in small} == {128, 256, 512}
    assert {found["rows_per_program"] for found in small} == {1}
    decode = list(configurations(SPLIT_KV, attention_context("attention.cross", "bfloat16", (1, 8, 2, 1, 40, 128))))
    assert {found["rows_per_program"] for found in decode} == {16}
    assert {found["block_keys"] for found in decode} == {16, 32, 64}


def test_a_loaded_kernel_serves_every_size() -> None:
    norm = TRITON_KERNELS["triton.rms_norm"]
    function = norm.load(row_context("norm.rms", "float32", 1, 7), {})
    for rows, width in ((9, 100), (2, 3000), (1, 20000)):
        x, weight = torch.randn(rows, width, device=DEVICE), torch.randn(width, device=DEVICE)
        expected = OPERATIONS["norm.rms"].reference(row_context("norm.rms", "float32", 1, 7), x, weight, 1e-6, 0.0)
        torch.testing.assert_close(function(x, weight, 1e-6, 0.0), expected[0])
