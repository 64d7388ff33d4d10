"""Performance, PS-020 to PS-022: what measurements of GPUs make of a selection, with described devices.

No GPU is at hand: the times come from a roofline of an H100, and the way from them to a plan is the real one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operation import Operation
from layerzero_runtime.operations import operation_named
from layerzero_runtime.plan import ExecutionPlan
from layerzero_runtime.tables.staleness import kernel_source_hash, version_that_matters
from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.identity import content_hash
from layerzero_tune.results.measurement import Measurement
from tests.runtime.conftest import tables_in_force
from tests.scenarios.conftest import A100, H100, attention, beside_builtin, kernel, only

# Shares of the bandwidth (3.35 TB/s) and of the arithmetic (989 TFLOP/s in bfloat16) of an H100 that invented kernels
# reach: one made for memory, one for the tensor cores, and the default, which is mediocre at both.
SHARES = {"my.streaming": (0.9, 0.3), "my.computing": (0.4, 0.8), "torch.sdpa": (0.6, 0.5)}
BANDWIDTH, FLOPS = 3.35e12, 989e12
BATCHES, QUERIES, KEYS = (1, 8, 64), (1, 16, 256, 2048), (512, 4096, 16384)
CROSS = operation_named("attention.cross")
_MADE: dict[str, Any] = {"operations": ("attention.cross",), "library": "torch", "supports_gqa": True}
MADE = (kernel("my.streaming", **_MADE), kernel("my.computing", **_MADE))


def roofline_ns(operation: Operation, context: SelectionContext) -> tuple[float, float]:
    """The least times that memory and arithmetic allow a call."""
    shapes = [tensor.shape(context) for tensor in operation.present_tensors(context)] + list(operation.outputs(context))
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    return 2 * elements / BANDWIDTH * 1e9, operation.flops(context) / FLOPS * 1e9


def kernel_ns(kernel_id: str, context: SelectionContext) -> float:
    memory, arithmetic = roofline_ns(CROSS, context)
    return max(memory / SHARES[kernel_id][0], arithmetic / SHARES[kernel_id][1])


@pytest.fixture(scope="module")
def h100_table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a tuning on an H100 with these kernels would have given, compiled and in force."""
    folder = tmp_path_factory.mktemp("h100")
    kernels = [each for each in (*builtin_kernels(), *MADE) if each.kernel_id in SHARES]
    cells = [CROSS.with_sizes(call(1, 1, 2), sizes) for sizes in itertools.product(BATCHES, QUERIES, KEYS)]
    emit(compile_table([row for cell in cells for row in contest(cell, kernels)], kernels)).write(folder)
    with tables_in_force(folder):
        yield


def call(batch: int, queries: int, keys: int) -> SelectionContext:
    return attention(
        operation="attention.cross",
        dtype="bfloat16",
        batch_size=batch,
        seq_len_q=queries,
        seq_len_k=keys,
        num_heads=8,
        num_kv_heads=1,
        head_dim=128,
    )


def contest(context: SelectionContext, kernels: Sequence[Kernel]) -> Iterator[Measurement]:
    for each in kernels:
        name = each.kernel_id
        nanoseconds = kernel_ns(name, context)
        yield Measurement(
            contest_id=content_hash(context.to_dict()),
            job_id=content_hash([context.to_dict(), name]),
            context=replace(context, device=None),
            kernel_id=name,
            configuration={},
            is_default=name == "torch.sdpa",
            status="ok",
            message="",
            relative_error=1e-3,
            tolerance=1e-2,
            screen_ns=nanoseconds,
            samples_ns=tuple(nanoseconds * (1 + 1e-4 * number) for number in range(8)),
            device=H100.to_dict(),
            versions={"torch": version_that_matters(each)},
            source_hash=kernel_source_hash(each),
            policy={},
            measured_at="2026-03-01T10:00:00+00:00",
        )


def selected(context: SelectionContext) -> ExecutionPlan:
    """The plan, with the kernels that the table names registered."""
    with beside_builtin(*MADE):
        return lz.select(context)


@pytest.mark.usefixtures("h100_table")
@pytest.mark.scenario("PS-020")
def test_where_memory_limits_a_large_batch_the_kernel_made_for_it_is_selected() -> None:
    for batch, keys in ((64, 4096), (64, 16384), (60, 5000)):
        context = call(batch, 1, keys)
        memory, arithmetic = roofline_ns(CROSS, context)
        assert memory > arithmetic
        plan = selected(context)
        assert (plan.source, plan.kernel_id) == ("table", "my.streaming")
        assert memory / kernel_ns(plan.kernel_id, context) > 0.8


@pytest.mark.usefixtures("h100_table")
@pytest.mark.scenario("PS-021")
def test_where_arithmetic_limits_a_small_batch_the_kernel_made_for_it_is_selected() -> None:
    for batch, queries, keys in ((1, 2048, 4096), (1, 2048, 16384), (1, 1900, 5000)):
        context = call(batch, queries, keys)
        memory, arithmetic = roofline_ns(CROSS, context)
        assert arithmetic > memory
        plan = selected(context)
        assert (plan.source, plan.kernel_id) == ("table", "my.computing")
        assert arithmetic / kernel_ns(plan.kernel_id, context) > 0.7


@pytest.mark.scenario("PS-022")
def test_equal_gpus_get_equal_plans_and_another_product_its_own() -> None:
    """Shards of one call do equal work on eight ranks; a straggler of another product is told apart."""
    hopper, portable = kernel("a.hopper", min_sm=(9, 0), priority=90), kernel("b.portable")
    with only(hopper, portable) as snapshot:
        shards = [attention(num_heads=64 // 8, device=replace(H100, index=rank)) for rank in range(8)]
        plans = [lz.select(shard) for shard in shards]
        assert {plan.kernel_id for plan in plans} == {"a.hopper"}
        assert len({repr(replace(plan, cached=False)) for plan in plans}) == 1
        assert snapshot.live_cache.computed.value == 1
        shards[3] = shards[3].with_device(replace(A100, index=3))
        assert [lz.select(shard).kernel_id for shard in shards] == [
            "b.portable" if rank == 3 else "a.hopper" for rank in range(8)
        ]
        assert snapshot.live_cache.computed.value == 2
