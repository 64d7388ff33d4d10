"""NO-001 to NO-012: single calls, batches of selections, chains of operations, heads and ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.selection.transforms import Transform
from tests.runtime.conftest import tables_in_force
from tests.scenarios.conftest import (
    CAUSAL_KERNELS,
    FULL_KERNELS,
    H100,
    XEON,
    Attend,
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

FLASH = kernel("flash_attn.fa2", priority=150)
CAUSAL, FULL, CROSS = "attention.causal", "attention.full", "attention.cross"


@pytest.mark.scenario("NO-001")
def test_a_plain_call_gets_the_best_kernel_computed_once_and_then_from_the_cache() -> None:
    with beside_builtin(FLASH):
        first, second = lz.select(attention()), lz.select(attention())
        assert (first.kernel_id, first.source, first.available) == ("flash_attn.fa2", "live", True)
        assert (first.cached, first.pre_transforms, first.post_transforms) == (False, (), ())
        assert second == replace(first, cached=True)


@pytest.mark.scenario("NO-001")
def test_what_the_best_kernel_refuses_falls_to_the_default_that_takes_everything() -> None:
    with beside_builtin(FLASH):
        context = attention(attn_mask="float", head_dim=72)
        assert lz.select(context).kernel_id == "torch.sdpa"
        assert "ATTN_MASK_NOT_ONE_OF" in reasons(context, "flash_attn.fa2")


@pytest.mark.scenario("NO-002")
def test_a_causal_call_is_of_its_own_operation_and_gets_the_kernel_for_that() -> None:
    """The kernel for full attention would win by priority if it were a candidate."""
    causal, full = Attend(is_causal=True), Attend()
    query, key, value = qkv(1, 2, 512)
    with beside_builtin(
        cpu_kernel("mine.causal", causal, operations=(CAUSAL,)),
        cpu_kernel("mine.full", full, operations=(FULL,), priority=300),
    ):
        output = lz.attention(query, key, value, is_causal=True)
        assert (len(causal.given), len(full.given)) == (1, 0)
        assert lz.select(SelectionContext.from_tensors(CAUSAL, query, key, value)).kernel_id == "mine.causal"
    hidden = torch.ones(512, 512, dtype=torch.bool).triu(1)
    assert_near(output, exact_attention(query, key, value, hidden=hidden))


@pytest.mark.scenario("NO-002")
def test_every_builtin_kernel_masks_what_lies_behind_the_query() -> None:
    query, key, value = qkv(1, 2, 512)
    exact = exact_attention(query, key, value, hidden=torch.ones(512, 512, dtype=torch.bool).triu(1))
    results = by_each_kernel(CAUSAL, lambda: lz.attention(query, key, value, is_causal=True))
    assert results.keys() == CAUSAL_KERNELS
    for result in results.values():
        assert_near(result, exact)


@pytest.mark.scenario("NO-003")
def test_a_norm_of_three_dimensions_gets_the_fused_kernel() -> None:
    x, weight = torch.empty(8, 4096, 4096, dtype=torch.float16), torch.empty(4096, dtype=torch.float16)
    context = SelectionContext.from_tensors("norm.rms", x, weight).with_device(H100)
    assert (context.rows, context.hidden_size) == (8 * 4096, 4096)
    fused = kernel("test.fused_rms_norm", operations=("norm.rms",), priority=150, fuses_ops=("square", "mean", "mul"))
    with beside_builtin(fused):
        assert lz.select(context).kernel_id == "test.fused_rms_norm"
        assert lz.explain(context).fuses == ("square", "mean", "mul")


@pytest.mark.scenario("NO-003")
@pytest.mark.parametrize(("width", "calls"), [(4096, 1), (4000, 0)])
def test_a_width_that_the_fused_norm_cannot_take_is_served_right_by_the_default(width: int, calls: int) -> None:
    widths: list[int] = []

    def fused(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        widths.append(x.shape[-1])
        return functional.rms_norm(x, x.shape[-1:], weight, eps)

    x, weight = torch.randn(8, 4, width), torch.randn(width)
    with beside_builtin(cpu_kernel("mine.rms_norm", fused, operations=("norm.rms",), hidden_size_multiple=1024)):
        output = lz.rms_norm(x, weight)
    assert widths == [width] * calls
    assert_near(output, x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight)


@pytest.mark.scenario("NO-004")
def test_a_batch_of_equal_contexts_is_computed_once() -> None:
    with beside_builtin(FLASH) as snapshot:
        plans = lz.select_batch([attention() for _ in range(16)])
        assert [plan.kernel_id for plan in plans] == ["flash_attn.fa2"] * 16
        assert snapshot.live_cache.computed.value == 1
        # Another dtype is no hit of theirs.
        [other] = lz.select_batch([attention(dtype="float32")])
        assert (other.kernel_id, other.cached) == ("torch.sdpa", False)
        assert snapshot.live_cache.computed.value == 2


@pytest.mark.scenario("NO-004")
def test_contexts_that_no_check_can_tell_apart_share_one_computation() -> None:
    with beside_builtin(FLASH) as snapshot:
        plans = lz.select_batch(attention(seq_len_q=length) for length in range(513, 529))
        assert [plan.cached for plan in plans] == [False] + [True] * 15
        assert (snapshot.live_cache.computed.value, snapshot.live_cache.hits.value) == (1, 15)


@pytest.mark.scenario("NO-005")
def test_each_batch_size_gets_the_kernel_for_its_size() -> None:
    small = kernel("mine.small_batches", max_batch_size=8, priority=150)
    with only(small, kernel("mine.any_batch", priority=120)):
        plans = lz.select_batch(attention(batch_size=size) for size in (1, 2, 4, 8, 16, 32))
        assert [plan.kernel_id for plan in plans] == ["mine.small_batches"] * 4 + ["mine.any_batch"] * 2
        assert not any(plan.cached for plan in plans)


@pytest.mark.scenario("NO-005")
def test_each_measured_batch_size_gets_the_winner_of_its_bucket(xeon_tables: Path) -> None:
    sizes = {"dtype": "float32", "seq_len_q": 64, "num_heads": 1, "head_dim": 16, "device": XEON}
    with tables_in_force(xeon_tables):
        plans = lz.select_batch(attention(batch_size=size, **sizes) for size in (1, 4, 16, 32))
    assert [(plan.source, plan.kernel_id) for plan in plans[:3]] == [
        ("table", "torch.sdpa.flash_cpu"),
        ("table", "torch.sdpa.flash_cpu"),
        ("table", "torch.sdpa"),
    ]
    # Beyond the largest measured size nothing is clamped to the nearest bucket.
    assert (plans[3].source, plans[3].miss_reason) == (
        "live",
        "outside the measured range: attention.full with (32, 64)",
    )


@pytest.mark.scenario("NO-006")
def test_operations_of_one_batch_choose_from_their_own_kernels() -> None:
    """Among them two whose calls have the same sizes, features and limits."""
    names = (CAUSAL, FULL, "norm.rms", "norm.add_rms", "mlp.swiglu")
    kernels = [
        kernel(f"mine.{name.replace('.', '_')}", operations=(name,), supports_mixed_weight_dtype=True) for name in names
    ]
    contexts = [attention(operation=name) if "attention" in name else norm(operation=name) for name in names]
    with only(*kernels) as snapshot:
        plans = lz.select_batch(contexts * 2)
        assert [(plan.operation, plan.kernel_id) for plan in plans[:5]] == [
            (name, kernel.kernel_id) for name, kernel in zip(names, kernels, strict=True)
        ]
        assert plans[5:] == plans[:5]
        assert snapshot.live_cache.computed.value == 5


def layer(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, up: Tensor, *, through: bool) -> Tensor:
    """Attention, norm, gated activation, norm: through LayerZero, or written in torch."""
    bias = torch.zeros_like(weight)
    if through:
        hidden = lz.layer_norm(lz.attention(query, key, value, is_causal=True), weight, bias)
        return lz.layer_norm(lz.swiglu(hidden, up), weight, bias)
    attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    hidden = functional.layer_norm(attended, weight.shape, weight, bias)
    return functional.layer_norm(functional.silu(hidden) * up, weight.shape, weight, bias)


@pytest.mark.scenario("NO-007")
def test_a_chain_of_operations_gives_torchs_values_even_where_one_kernel_has_another_layout() -> None:
    attend = Attend(is_causal=True, layout="bshd")
    query, key, value = qkv()
    weight, up = torch.rand(16) + 0.5, torch.randn(2, 4, 8, 16)
    exact = layer(*(part.double() for part in (query, key, value, weight, up)), through=False)
    with beside_builtin(cpu_kernel("mine.bshd", attend, operations=(CAUSAL,), layouts=("bshd",))):
        plan = lz.select(SelectionContext.from_tensors(CAUSAL, query, key, value))
        assert plan.pre_transforms == (Transform("transpose", "bshd", copies=False),)
        assert plan.post_transforms == (Transform("transpose", "bhsd", copies=False),)
        before = lz.stats()["misses"]
        output = layer(query, key, value, weight, up, through=True)
        # Each of the four operations was selected by itself.
        assert lz.stats()["misses"] == before + 4
    assert attend.given[0][0].shape == (2, 8, 4, 16)
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.scenario("NO-008")
def test_cross_and_then_causal_attention_each_get_their_kernel() -> None:
    cross, causal = Attend(), Attend(is_causal=True)
    query, key, value = qkv(length=6, length_k=20)
    with beside_builtin(
        cpu_kernel("mine.cross", cross, operations=(CROSS,)), cpu_kernel("mine.causal", causal, operations=(CAUSAL,))
    ):
        encoded = lz.attention(query, key, value)
        decoded = lz.attention(encoded, encoded, encoded, is_causal=True)
        assert (len(cross.given), len(causal.given)) == (1, 1)
    exact = exact_attention(query, key, value)
    assert_near(encoded, exact)
    assert_near(decoded, exact_attention(exact, exact, exact, hidden=torch.ones(6, 6, dtype=torch.bool).triu(1)))


@pytest.mark.scenario("NO-008")
def test_without_a_kernel_for_cross_attention_the_default_serves_it() -> None:
    with beside_builtin(kernel("mine.causal", operations=(CAUSAL,), priority=150)):
        plans = lz.select_batch([attention(operation=CROSS, seq_len_k=77), attention(operation=CAUSAL)])
        assert [plan.kernel_id for plan in plans] == ["torch.sdpa", "mine.causal"]


@pytest.mark.scenario("NO-009")
def test_swiglu_runs_fused_where_the_fused_kernel_takes_the_call_and_in_steps_elsewhere() -> None:
    calls: list[tuple[int, ...]] = []

    def fused(gate: Tensor, up: Tensor) -> Tensor:
        calls.append(tuple(gate.shape))
        return functional.silu(gate).mul_(up)

    gate, up = torch.randn(6, 64), torch.randn(6, 64)
    strided = torch.randn(64, 6).t()
    spec = {"operations": ("mlp.swiglu",), "fuses_ops": ("silu", "mul"), "requires_contiguous": True}
    with beside_builtin(cpu_kernel("mine.swiglu", fused, **spec)):
        explanation = lz.explain(SelectionContext.from_tensors("mlp.swiglu", gate, up))
        assert (explanation.plan.kernel_id, explanation.fuses) == ("mine.swiglu", ("silu", "mul"))
        assert "fuses: silu, mul" in str(explanation)
        output, of_strided = lz.swiglu(gate, up), lz.swiglu(strided, up)
        plan = lz.select(SelectionContext.from_tensors("mlp.swiglu", strided, up))
        assert plan.kernel_id == "torch.swiglu"
    assert calls == [(6, 64)]
    assert_near(output, functional.silu(gate.double()) * up)
    assert_near(of_strided, functional.silu(strided.double()) * up)


@pytest.mark.scenario("NO-010")
def test_grouped_queries_go_to_a_kernel_that_knows_groups() -> None:
    context = attention(num_heads=32, num_kv_heads=8)
    with only(kernel("mine.no_groups", priority=300), kernel("mine.groups", supports_gqa=True)):
        assert lz.select(context).kernel_id == "mine.groups"
        assert reasons(context, "mine.no_groups") == "GQA_GROUP_NOT_ONE_OF: gqa_group is 4, required 1"
        assert lz.select(attention(num_heads=32)).kernel_id == "mine.no_groups"


@pytest.mark.scenario("NO-010")
def test_every_builtin_kernel_broadcasts_the_heads_of_a_group_right() -> None:
    query, key, value = qkv(2, 32, 12, kv_heads=8)
    results = by_each_kernel(FULL, lambda: lz.attention(query, key, value, enable_gqa=True))
    assert results.keys() == FULL_KERNELS | {"torch.sdpa.flash_cpu_folded"}
    for result in results.values():
        assert_near(result, exact_attention(query, key, value))
    with pytest.raises(ContextError, match="query has 32 heads and key 8; pass enable_gqa=True"):
        lz.attention(query, key, value)


@pytest.mark.scenario("NO-011")
def test_tensor_parallel_ranks_select_by_and_compute_with_their_local_heads() -> None:
    attend = Attend()
    few_heads = cpu_kernel(
        "mine.few_heads", attend, supports_gqa=True, extra_limits=(Limit("num_heads", "at_most", 8),)
    )
    query, key, value = qkv(2, 32, 12, kv_heads=8)
    with beside_builtin(few_heads):
        shards = zip(query.chunk(4, dim=1), key.chunk(4, dim=1), value.chunk(4, dim=1), strict=True)
        parts = [lz.attention(*shard, enable_gqa=True) for shard in shards]
        assert [tuple(q.shape) + tuple(k.shape) for q, k, _ in attend.given] == [(2, 8, 12, 16, 2, 2, 12, 16)] * 4
        whole = lz.attention(query, key, value, enable_gqa=True)
        assert len(attend.given) == 4
        context = SelectionContext.from_tensors(FULL, query, key, value)
        assert reasons(context, "mine.few_heads") == "NUM_HEADS_NOT_AT_MOST: num_heads is 32, required <= 8"
    assert_near(torch.cat(parts, dim=1), exact_attention(query, key, value))
    assert_near(whole, exact_attention(query, key, value))


PLANS_OF_A_STAGE = """
from layerzero_runtime import DeviceSpec, KernelSpec, SelectionContext, register_kernel, select
from layerzero_runtime.dispatch import current_snapshot
operations = ("attention.causal", "attention.full")
for name, priority in (("mine.better", 300), ("mine.other", 200)):
    fields = {"platforms": ("cuda",), "dtypes": ("bfloat16",), "requires": (), "priority": priority}
    register_kernel(KernelSpec(kernel_id=name, operations=operations, **fields), print)
for device in (None, DeviceSpec("cuda", "NVIDIA H100 80GB HBM3", compute_capability=(9, 0))):
    for operation in operations:
        sizes = {"batch_size": 4, "seq_len_q": 64, "num_heads": 8, "head_dim": 128}
        print(select(SelectionContext(operation=operation, dtype="bfloat16", device=device, **sizes)))
print(current_snapshot().digest)
"""


@pytest.mark.scenario("NO-012")
def test_a_middle_pipeline_stage_selects_like_a_single_process() -> None:
    """In real processes; the digest covers kernels, policy and tables."""

    def printed(**environment: str) -> list[str]:
        names = {name: value for name, value in os.environ.items() if "RANK" not in name and name != "WORLD_SIZE"}
        command = [sys.executable, "-c", PLANS_OF_A_STAGE]
        done = subprocess.run(command, env=names | environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    alone = printed()
    assert len(alone) == 5
    assert all("kernel_id='mine.better'" in line for line in alone[2:4])
    assert printed(RANK="3", LOCAL_RANK="3", WORLD_SIZE="8", PP_SIZE="8", PP_RANK="3") == alone
