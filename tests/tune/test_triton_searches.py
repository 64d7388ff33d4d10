"""Searches of the spaces of the Triton kernels, for a described GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.limits import rejections
from layerzero_tune.measure.contest import ContestOutcome, JobOutcome
from layerzero_tune.search.configurations.search_policy import SearchPolicy
from layerzero_tune.search.configurations.searched import Searched
from layerzero_tune.search.configurations.searches import Searches
from layerzero_tune.search.configurations.trial import text_of
from layerzero_tune.search.configurations.valid import valid_configurations
from layerzero_tune.search.device import rows_of
from layerzero_tune.search.jobs import JobIdentity
from tests.tune.clocked_device import POLICY, SEARCH

H100 = DeviceSpec(
    platform="cuda",
    name="NVIDIA H100 80GB HBM3",
    compute_capability=(9, 0),
    multiprocessors=132,
    bandwidth_bytes_per_s=3.35e12,
)
TRITON = {kernel.kernel_id: kernel for kernel in builtin_kernels() if kernel.space is not None}


def triton_context(operation: str, size: int) -> SelectionContext:
    if operation.startswith("linear"):
        dtype = "int8" if operation == "linear.int8" else "float8_e4m3fn"
        return SelectionContext(operation=operation, dtype=dtype, rows=size, in_features=4096, out_features=14336)
    if not operation.startswith("attention"):
        return SelectionContext(operation=operation, dtype="bfloat16", rows=size, hidden_size=4096)
    call = SelectionContext(operation=operation, dtype="bfloat16", batch_size=4, num_heads=32, num_kv_heads=8)
    return replace(call, seq_len_q=1, seq_len_k=size, head_dim=128, causal_alignment="bottom_right")


@pytest.mark.parametrize(
    ("kernel_id", "operation"),
    [(kernel.kernel_id, operation) for kernel in TRITON.values() for operation in kernel.spec.operations],
)
def test_a_search_proposes_what_the_kernel_allows_on_the_device_and_fewer_near_another(
    kernel_id: str, operation: str
) -> None:
    kernel, searched = TRITON[kernel_id], Searched()
    searches = Searches(Registry(TRITON.values()), JobIdentity(H100, POLICY), SEARCH)
    counts: list[int] = []
    for size in (2048, 4096):
        context = triton_context(operation, size)
        assert not rejections(kernel.spec.limits, context.with_device(H100))
        valid = valid_configurations(kernel.space, context.with_device(H100)) if kernel.space else {}
        assert len(valid) > SearchPolicy().enumerated
        proposed: list[str] = []
        while (step := searches.step(context, kernel_id, searched)) is not None:
            contest = step.contest
            fresh = [candidate.configuration for candidate in contest.candidates[1:]]
            times = [1e6 + sum(hash(value) for value in c.configuration.values()) for c in contest.candidates]
            jobs = tuple(JobOutcome("ok", screen_ns=float(time)) for time in times)
            ended = f"2026-03-01T00:{len(counts):02}:{len(proposed):02}+00:00"
            searched.add(rows_of(contest, ContestOutcome(jobs, ended), TRITON, H100))
            proposed += map(text_of, fresh)
        assert len(set(proposed)) == len(proposed)
        assert set(proposed) <= set(valid)
        counts.append(len(proposed))
        found = [proposal.configuration for proposal in searches.proposals(context, kernel_id, searched)]
        assert 1 <= len(found) <= SEARCH.finalists
        assert set(map(text_of, found)) <= set(proposed)
    assert counts == [SEARCH.measurements, SEARCH.near_measurements]
