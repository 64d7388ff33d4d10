"""NO-013 to NO-023: sizes from a few tokens to 128K, head dimensions, and dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import NoKernelAvailableError
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.selection.limits import Limit, rejections
from layerzero_runtime.selection.transforms import Transform
from tests.scenarios.conftest import (
    A100,
    FULL_KERNELS,
    H100,
    T4,
    XEON,
    assert_near,
    attention,
    beside_builtin,
    by_each_kernel,
    cpu_kernel,
    exact_attention,
    kernel,
    norm,
    only,
    qkv,
    reasons,
)

pytestmark = pytest.mark.usefixtures("without_tables")

K = 1024


@pytest.mark.scenario("NO-013")
def test_a_few_tokens_go_to_the_decode_kernel_not_to_the_prefill_kernel() -> None:
    prefill = kernel("mine.prefill", priority=200, min_seq_len=64)
    decode = kernel("mine.decode", priority=150, extra_limits=(Limit("seq_len_q", "at_most", 16),))
    with beside_builtin(prefill, decode):
        short = attention(seq_len_q=16)
        assert lz.select(short).kernel_id == "mine.decode"
        assert "SEQ_LEN_Q_NOT_AT_LEAST: seq_len_q is 16, required >= 64" in reasons(short, "mine.prefill")
        assert lz.select(attention(operation="attention.cross", seq_len_q=1, seq_len_k=4096)).kernel_id == "mine.decode"
        assert lz.select(attention(seq_len_q=512)).kernel_id == "mine.prefill"


@pytest.mark.scenario("NO-013")
@pytest.mark.parametrize("device", [XEON, H100])
def test_the_builtin_kernels_serve_a_single_token_on_every_platform_of_theirs(device: lz.DeviceSpec) -> None:
    for operation in ("attention.full", "attention.causal"):
        context = attention(operation=operation, seq_len_q=1, device=device)
        assert any(
            not rejections(kernel.spec.limits, context)
            for kernel in builtin_kernels()
            if operation in kernel.spec.operations
        )


@pytest.mark.scenario("NO-013")
@pytest.mark.parametrize("length", [1, 16])
def test_every_builtin_kernel_is_right_for_a_few_tokens(length: int) -> None:
    query, key, value = qkv(length=length)
    results = by_each_kernel("attention.full", lambda: lz.attention(query, key, value))
    assert results.keys() == FULL_KERNELS
    for result in results.values():
        assert_near(result, exact_attention(query, key, value))


@pytest.mark.scenario("NO-014")
def test_128k_tokens_go_to_the_kernel_that_takes_them() -> None:
    short = kernel("mine.short", priority=300, max_seq_len=64 * K)
    long = kernel("mine.long", priority=150, max_seq_len=128 * K)
    with beside_builtin(short, long):
        context = attention(batch_size=1, seq_len_q=128 * K)
        assert lz.select(context).kernel_id == "mine.long"
        assert "SEQ_LEN_Q_NOT_AT_MOST: seq_len_q is 131072, required <= 65536" in reasons(context, "mine.short")
        assert lz.select(attention(seq_len_q=64 * K)).kernel_id == "mine.short"
        # Beyond what any special kernel takes the default still answers.
        assert lz.select(attention(batch_size=1, seq_len_q=2048 * K)).kernel_id == "torch.sdpa"
    with only(short, long), pytest.raises(NoKernelAvailableError, match="required <= 131072"):
        lz.select(attention(batch_size=1, seq_len_q=128 * K + 1))


@pytest.mark.scenario("NO-014")
def test_a_kernel_whose_workspace_is_too_large_for_the_call_gives_way() -> None:
    """Score matrices of 128K tokens would be 64 GiB in float32: the kernels that write them out refuse."""
    context = attention(batch_size=1, seq_len_q=128 * K, num_heads=1, device=XEON, dtype="float32")
    for kernel_id in ("torch.sdpa.math", "torch.matmul"):
        assert "SCORE_ELEMENTS_NOT_AT_MOST: score_elements is 17179869184" in reasons(context, kernel_id)
    with beside_builtin(kernel("mine.chunked", priority=150, workspace_bytes=2**30)):
        enough, too_little = (attention(seq_len_q=128 * K, workspace_limit=size) for size in (2**30, 2**30 - 1))
        assert lz.select(enough).kernel_id == "mine.chunked"
        assert lz.select(too_little).kernel_id == "torch.sdpa"
        assert "WORKSPACE_LIMIT_NOT_AT_LEAST" in reasons(too_little, "mine.chunked")


@pytest.mark.scenario("NO-014")
def test_a_long_sequence_has_right_values() -> None:
    """Sampled rows of 8192 tokens, against the same rows alone."""
    query, key, value = qkv(1, 1, 8192, 8)
    output = lz.attention(query, key, value)
    sampled = torch.tensor([0, 1, 4095, 4096, 8191])
    default = torch.nn.functional.scaled_dot_product_attention(query, key, value)[:, :, sampled]
    assert_near(output[:, :, sampled], exact_attention(query[:, :, sampled], key, value), default)


@pytest.mark.scenario("NO-015")
def test_a_large_batch_goes_to_the_kernel_for_large_batches() -> None:
    limited = kernel("mine.limited", priority=200, max_batch_size=128)
    with only(limited, kernel("mine.batched", workspace_bytes=2**20)):
        context = attention(batch_size=256, workspace_limit=2**20)
        assert lz.select(context).kernel_id == "mine.batched"
        refusal = "BATCH_SIZE_NOT_AT_MOST: batch_size is 256, required <= 128"
        assert reasons(context, "mine.limited") == refusal
        with pytest.raises(NoKernelAvailableError) as error:
            lz.select(attention(batch_size=256, workspace_limit=0))
        assert error.value.rejections["mine.limited"] == (refusal,)


@pytest.mark.scenario("NO-015")
def test_each_of_256_sequences_has_the_values_that_it_has_alone() -> None:
    query, key, value = qkv(256, 2, 16)
    results = by_each_kernel("attention.full", lambda: lz.attention(query, key, value))
    assert results.keys() == FULL_KERNELS
    for result in results.values():
        for item in (0, 127, 128, 255):
            alone = slice(item, item + 1)
            assert_near(result[alone], exact_attention(query[alone], key[alone], value[alone]))


@pytest.mark.scenario("NO-016")
@pytest.mark.scenario("NO-017")
@pytest.mark.parametrize("width", [32, 256])
def test_small_and_large_head_dimensions_go_to_a_kernel_that_takes_them(width: int) -> None:
    usual = kernel("mine.usual", priority=200, min_head_dim=64, max_head_dim=128)
    wide = kernel("mine.wide", priority=150, min_head_dim=32, max_head_dim=256)
    with beside_builtin(usual, wide):
        assert lz.select(attention(head_dim=width)).kernel_id == "mine.wide"
        assert f"head_dim is {width}, required" in reasons(attention(head_dim=width), "mine.usual")
        assert lz.select(attention(head_dim=128)).kernel_id == "mine.usual"
        for beyond in (24, 264):
            assert lz.select(attention(head_dim=beyond)).kernel_id == "torch.sdpa"


@pytest.mark.scenario("NO-016")
@pytest.mark.scenario("NO-017")
@pytest.mark.parametrize("width", [32, 256])
def test_every_builtin_kernel_is_right_for_small_and_large_head_dimensions(width: int) -> None:
    query, key, value = qkv(1, 2, 40, width)
    results = by_each_kernel("attention.full", lambda: lz.attention(query, key, value))
    assert results.keys() == FULL_KERNELS
    for result in results.values():
        assert_near(result, exact_attention(query, key, value))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        # torch.matmul would overflow in float16 where SDPA does not.
        pytest.param(torch.float16, FULL_KERNELS - {"torch.matmul"}, marks=pytest.mark.scenario("NO-018")),
        pytest.param(torch.bfloat16, FULL_KERNELS, marks=pytest.mark.scenario("NO-019")),
        pytest.param(torch.float32, FULL_KERNELS, marks=pytest.mark.scenario("NO-020")),
    ],
)
def test_every_dtype_is_computed_right(dtype: torch.dtype, expected: set[str]) -> None:
    query, key, value = qkv(dtype=dtype)
    results = by_each_kernel("attention.full", lambda: lz.attention(query, key, value))
    assert results.keys() == expected
    for result in results.values():
        assert result.dtype == dtype
        assert_near(result, exact_attention(query, key, value))


@pytest.mark.scenario("NO-018")
def test_half_precision_goes_to_the_kernel_for_it() -> None:
    with only(kernel("mine.bf16", priority=200, dtypes=("bfloat16",)), kernel("mine.fp16", dtypes=("float16",))):
        assert lz.select(attention()).kernel_id == "mine.fp16"
        assert reasons(attention(), "mine.bf16") == "DTYPE_NOT_ONE_OF: dtype is 'float16', required 'bfloat16'"


@pytest.mark.scenario("NO-019")
def test_bfloat16_goes_to_a_kernel_for_ampere_and_to_the_default_before_it() -> None:
    with beside_builtin(kernel("flash_attn.fa2", priority=150, min_sm=(8, 0))):
        assert lz.select(attention(dtype="bfloat16", device=A100)).kernel_id == "flash_attn.fa2"
        older = attention(dtype="bfloat16", device=T4)
        assert lz.select(older).kernel_id == "torch.sdpa"
        assert reasons(older, "flash_attn.fa2") == "SM_NOT_AT_LEAST: sm is (7, 5), required >= (8, 0)"


@pytest.mark.scenario("NO-020")
def test_full_precision_goes_to_sdpa_where_the_fast_kernels_have_none() -> None:
    with beside_builtin(kernel("flash_attn.fa2", priority=150)):
        assert lz.select(attention(dtype="float32")).kernel_id == "torch.sdpa"
        assert "dtype is 'float32'" in reasons(attention(dtype="float32"), "flash_attn.fa2")


@pytest.mark.scenario("NO-021")
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_a_quantised_kernel_serves_calls_that_ask_for_it_and_no_others(dtype: str) -> None:
    quantised = kernel("sage.int8", priority=300, dtypes=("int8", "float16"), quant_formats=("int8",))
    with beside_builtin(quantised, kernel("flash_attn.fa2", priority=150)):
        asked = attention(dtype=dtype, quant_format="int8")
        assert lz.select(asked).kernel_id == "sage.int8"
        assert "QUANT_FORMAT_NOT_ONE_OF: quant_format is 'int8', required None" in reasons(asked, "flash_attn.fa2")
        plain = attention()
        assert lz.select(plain).kernel_id == "flash_attn.fa2"
        assert reasons(plain, "sage.int8") == "QUANT_FORMAT_NOT_ONE_OF: quant_format is None, required 'int8'"
        with pytest.raises(NoKernelAvailableError, match="quant_format is 'fp8'"):
            lz.select(attention(quant_format="fp8"))


@pytest.mark.scenario("NO-022")
def test_fp8_goes_to_a_kernel_for_hopper_and_is_refused_before_it() -> None:
    with beside_builtin(kernel("flash_attn.fp8", dtypes=("float8_e4m3fn",), min_sm=(9, 0))):
        assert lz.select(attention(dtype="float8_e4m3fn")).kernel_id == "flash_attn.fp8"
        with pytest.raises(NoKernelAvailableError) as error:
            lz.select(attention(dtype="float8_e4m3fn", device=A100))
    assert error.value.rejections["flash_attn.fp8"] == ("SM_NOT_AT_LEAST: sm is (8, 0), required >= (9, 0)",)
    assert "dtype is 'float8_e4m3fn'" in error.value.rejections["torch.sdpa"][0]


@pytest.mark.scenario("NO-023")
def test_a_weight_of_another_dtype_goes_to_a_kernel_that_takes_both() -> None:
    same = kernel("mine.same", operations=("norm.rms",), priority=300)
    mixed = kernel("mine.mixed", operations=("norm.rms",), priority=150, supports_mixed_weight_dtype=True)
    context = norm(weight_dtype="float8_e4m3fn")
    with beside_builtin(same, mixed):
        assert lz.select(context).kernel_id == "mine.mixed"
        refusal = "MIXED_WEIGHT_DTYPE_NOT_ONE_OF: mixed_weight_dtype is 'float8_e4m3fn', required None"
        assert reasons(context, "mine.same") == refusal
        assert lz.select(norm()).kernel_id == "mine.same"


@pytest.mark.scenario("NO-023")
@pytest.mark.parametrize(("produced", "casts"), [("float16", ()), (None, (Transform("cast", "float16", copies=True),))])
def test_float8_in_and_float16_out_is_the_kernels_own_or_a_cast_behind_it(
    produced: str | None, casts: tuple[Transform, ...]
) -> None:
    with only(kernel("mine.fp8", dtypes=("float8_e4m3fn",), produces_dtype=produced)):
        plan = lz.select(attention(dtype="float8_e4m3fn", output_dtype="float16"))
        assert (plan.kernel_id, plan.post_transforms) == ("mine.fp8", casts)


@pytest.mark.scenario("NO-023")
def test_a_norm_with_a_weight_of_another_dtype_has_right_values() -> None:
    called: list[Tensor] = []

    def same(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        called.append(x)
        return functional.rms_norm(x, x.shape[-1:], weight, eps)

    x, weight = torch.randn(6, 64, dtype=torch.float16), torch.randn(64)
    with beside_builtin(cpu_kernel("mine.same", same, operations=("norm.rms",))):
        output = lz.rms_norm(x, weight)
        plan = lz.select(SelectionContext.from_tensors("norm.rms", x, weight))
        assert plan.kernel_id == "torch.rms_norm"
    assert not called
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert_near(output.to(torch.float16), exact)
    torch.testing.assert_close(output, functional.rms_norm(x, (64,), weight, 1e-6), rtol=0, atol=0)
