"""Presets: those of CPUs stay as they are, those of GPUs have what a server calls, as far as the memory goes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operations import OPERATIONS, operation_named
from layerzero_runtime.registry import Registry
from layerzero_tune.command_line import run_devices
from layerzero_tune.compile.coverage import max_product_of, unmeasured_cells
from layerzero_tune.identity import content_hash
from layerzero_tune.measure.inputs import check_measurable
from layerzero_tune.search.jobs import legal_candidates
from layerzero_tune.workload.cuda_grids import CUDA_GRIDS
from layerzero_tune.workload.lines import WorkloadLine
from layerzero_tune.workload.presets import PRESETS, preset_workload
from tests.tune.command import CommandsHere

MEMORY_BYTES = 85_520_809_984
H100 = DeviceSpec(
    platform="cuda",
    name="NVIDIA H100 80GB HBM3",
    compute_capability=(9, 0),
    multiprocessors=132,
    memory_bytes=MEMORY_BYTES,
    bandwidth_bytes_per_s=3.35e12,
)
ALL = tuple(OPERATIONS)
LONGEST = {"quick": 8192, "standard": 32768, "full": 131072}


@cache
def contexts(preset: str, device: DeviceSpec = H100, operations: tuple[str, ...] = ALL) -> tuple[SelectionContext, ...]:
    return tuple(line.context for line in preset_workload(preset, operations, device))


def held_bytes(context: SelectionContext) -> int:
    """What a contest at the point holds: six times its arguments and results, of two bytes each."""
    operation = operation_named(context.operation)
    shapes = [tensor.shape(context) for tensor in operation.present_tensors(context)]
    return 6 * 2 * sum(map(math.prod, (*shapes, *operation.outputs(context))))


@pytest.mark.parametrize(
    ("preset", "number", "content"),
    [
        ("quick", 714, "75093045e29a39a1c95658fdb7c48bf4"),
        ("standard", 1884, "3cdc1e1364bc8654d8930851c78f5676"),
        ("full", 6808, "ddb0a9dfd2fac26990b565618df5722e"),
    ],
)
def test_points_of_cpus_are_those_of_the_committed_results(preset: str, number: int, content: str) -> None:
    """Others would make whoever continues a run measure anew. The numbers are of the release before GPUs had any."""
    lines = preset_workload(preset, ALL)
    assert len(lines) == number
    assert content_hash([[line.context.to_dict(), line.weight] for line in lines]) == content
    assert preset_workload(preset, ALL, DeviceSpec(platform="cpu", name="Some CPU")) == lines


@pytest.mark.parametrize("preset", PRESETS)
def test_every_call_of_a_server_is_there_in_both_modes_and_types(preset: str) -> None:
    longest = LONGEST[preset]
    found = contexts(preset)
    for mode in ("eager", "graph"):
        for dtype in ("bfloat16", "float16"):
            some = [context for context in found if (context.mode, context.dtype) == (mode, dtype)]
            assert {context.operation for context in some} == {name for name in ALL if not name.startswith("linear.")}
            attention = [context for context in some if context.num_heads is not None]
            square = [context for context in attention if context.seq_len_q == context.seq_len_k]
            chunks = [c for c in attention if c.operation == "attention.causal" and c.seq_len_q != c.seq_len_k]
            decode = [context for context in attention if context.seq_len_q == 1]
            assert max(c.seq_len_q for c in square if c.is_causal) == longest  # type: ignore[type-var]
            assert max(c.seq_len_q for c in square if not c.is_causal) == longest  # type: ignore[type-var]
            assert {context.causal_alignment for context in chunks} == {"bottom_right"}
            assert max(context.seq_len_k for context in chunks) == longest  # type: ignore[type-var]
            assert max(context.seq_len_k for context in decode) == longest  # type: ignore[type-var]
            assert max(context.batch_size for context in decode) >= 64  # type: ignore[type-var,operator]
            assert max(context.rows for context in some if context.rows is not None) == longest


@pytest.mark.parametrize("preset", PRESETS)
def test_every_point_can_be_measured(preset: str) -> None:
    registry = Registry(builtin_kernels())
    found = contexts(preset)
    for context in found:
        operation_named(context.operation).validate(context)
        check_measurable(context)
    for context in found[::17]:
        assert legal_candidates(registry, context.with_device(H100))[0].is_default


@pytest.mark.parametrize("preset", PRESETS)
def test_holes_are_next_to_what_is_too_large_alone(preset: str) -> None:
    """Too large for the memory or for the preset's time; a chunk has no more queries than keys."""
    keys: dict[tuple[object, ...], list[SelectionContext]] = {}
    for context in contexts(preset):
        if (context.mode, context.dtype) == ("graph", "float16"):
            key = (context.operation, operation_named(context.operation).static_key(context))
            keys.setdefault(key, []).append(context)
    for found in keys.values():
        operation = operation_named(found[0].operation)
        free = tuple(operation.axes.index(axis) for axis in operation.axes_of(found[0]))
        sizes = [operation.sizes(context) for context in found]
        for hole in unmeasured_cells(sizes, free, max_product_of(sizes, free)):
            context = operation.with_sizes(found[0], hole)
            is_no_chunk = context.causal_alignment == "bottom_right" and hole[1] > hole[2]
            too_many_scores = (context.score_elements or 0) > CUDA_GRIDS[preset].max_scores
            assert is_no_chunk or too_many_scores or 2 * held_bytes(context) > MEMORY_BYTES, (hole, context.to_dict())


@pytest.mark.parametrize("memory_bytes", [8 * 2**30, None])
def test_what_the_memory_does_not_hold_is_left_out(memory_bytes: int | None) -> None:
    found, of_large = contexts("full", replace(H100, memory_bytes=memory_bytes)), contexts("full")
    limit = memory_bytes or 16 * 2**30
    assert max(map(held_bytes, found)) <= limit < max(map(held_bytes, of_large)) <= MEMORY_BYTES
    grid = CUDA_GRIDS["full"]
    norms = [point for point in of_large if point.rows in grid.rows and point.hidden_size in grid.hidden_sizes]
    assert {point for point in norms if held_bytes(point) <= limit} <= set(found)


def test_a_part_of_the_operations_has_the_same_points() -> None:
    some = ("attention.cross", "norm.rms")
    assert list(contexts("quick", operations=some)) == [c for c in contexts("quick") if c.operation in some]


def test_a_run_on_a_gpu_takes_a_preset(
    command: CommandsHere, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(run_devices, "live_device", lambda name: H100)
    ended = command("run", "--device", "cuda:0", "--ops", "attention.full", "--dry-run", "--json", "--out", tmp_path)
    assert ended.json["contests"] == len(contexts("quick", operations=("attention.full",)))


def test_lines_weigh_alike() -> None:
    assert {type(line) for line in preset_workload("quick", ALL, H100)} == {WorkloadLine}
    assert {line.weight for line in preset_workload("quick", ALL, H100)} == {1.0}
