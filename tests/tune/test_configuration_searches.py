"""What searches of configurations know: when they are over, what they propose, and which results count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.registry import Registry
from layerzero_tune.measure.contest import ContestOutcome, JobOutcome
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.configurations.bound import memory_bound_ns
from layerzero_tune.search.configurations.searched import Searched
from layerzero_tune.search.configurations.searches import Searches
from layerzero_tune.search.configurations.trial import text_of, trials_of
from layerzero_tune.search.device import rows_of
from layerzero_tune.search.jobs import JobIdentity
from tests.tune.clocked_device import POLICY, SEARCH, ClockedDevice, cost, first_step, run, searches_of
from tests.tune.configured_kernels import MANY, PASSES
from tests.tune.synthetic_results import DEVICE, full, norm

PLAIN = norm(8)
DEFAULT = "torch.rms_norm"


def test_a_search_ends_where_the_memory_can_give_no_more() -> None:
    """A call of 4096 x 4096 in float32 reads and writes 64 MiB each and the weight: 134 us at 1 TB/s."""
    context = replace(norm(4096, 4096), dtype="float32")
    fast = DeviceSpec(platform="cuda", name="GPU", multiprocessors=4, bandwidth_bytes_per_s=1e12)
    bound = memory_bound_ns(context.with_device(fast))
    assert bound is not None
    assert bound == pytest.approx((2 * 4096 * 4096 + 4096) * 4 / 1e12 * 1e9)
    assert memory_bound_ns(context.with_device(DEVICE)) is None
    assert memory_bound_ns(context) is None
    kernels = {MANY.kernel_id: MANY}
    searches = Searches(Registry([MANY]), JobIdentity(fast, POLICY), SEARCH)
    first = searches.step(context, MANY.kernel_id, Searched())
    assert first is not None
    assert first.left == SEARCH.measurements / SEARCH.batch

    def searched(shortest_ns: float) -> Searched:
        outcomes = tuple(JobOutcome("ok", screen_ns=shortest_ns * number) for number in range(1, 10))
        return Searched(rows_of(first.contest, ContestOutcome(outcomes, "2026-03-01T00:00:00+00:00"), kernels, fast))

    assert searches.is_over(context, MANY.kernel_id, searched(0.3 * bound))
    assert searches.step(context, MANY.kernel_id, searched(0.3 * bound)) is None
    again = Searches(Registry([MANY]), JobIdentity(fast, POLICY), SEARCH)
    assert not again.is_over(context, MANY.kernel_id, searched(0.6 * bound))
    assert again.step(context, MANY.kernel_id, searched(0.6 * bound)) is not None


def test_keys_that_a_mask_hides_leave_no_bound() -> None:
    fast = DeviceSpec(platform="cuda", name="GPU", multiprocessors=4, bandwidth_bytes_per_s=1e12)
    call = replace(full(4, 3, batch_size=2), operation="attention.causal", seq_len_k=500, device=fast)
    assert memory_bound_ns(replace(call, causal_alignment="top_left")) is None
    aligned = memory_bound_ns(replace(call, causal_alignment="bottom_right"))
    assert call.head_dim is not None
    assert aligned == pytest.approx(2 * 4 * call.head_dim * (3 + 500) * 4 / 1e12 * 1e9)


def test_points_of_another_static_key_and_contests_of_all_kernels_begin_nothing(tmp_path: Path) -> None:
    device = ClockedDevice([DEFAULT, MANY.kernel_id])
    store = ResultsStore(tmp_path)
    run(device, store, norm(64))
    searched = Searched(store.read().rows)
    [(octaves, rows)] = searched.around(MANY.kernel_id, norm(65))
    assert octaves == pytest.approx(math.log2(65 / 64))
    assert rows == searched.rows(MANY.kernel_id, norm(64))
    assert searched.around(MANY.kernel_id, norm(64)) == []
    assert searched.around(MANY.kernel_id, replace(norm(65), mode="graph")) == []
    assert searched.around(DEFAULT, norm(65)) == []
    assert all(row.is_search for row in searched.rows(MANY.kernel_id, norm(64)))


def searched_at(folder: Path, contexts: Sequence[SelectionContext]) -> list[Measurement]:
    run(ClockedDevice([DEFAULT, PASSES.kernel_id]), ResultsStore(folder), *contexts)
    return [row for row in ResultsStore(folder).read().rows if row.is_search]


def test_results_of_another_source_do_not_count(tmp_path: Path) -> None:
    rows = searched_at(tmp_path, [PLAIN])
    older = Searched(replace(row, job_id=row.job_id[::-1]) for row in rows)
    device = ClockedDevice([DEFAULT, PASSES.kernel_id])
    assert first_step(device, PLAIN, PASSES.kernel_id, older) == first_step(device, PLAIN, PASSES.kernel_id)
    assert searches_of(device).proposals(norm(9), PASSES.kernel_id, older) == ()
    current = ClockedDevice([DEFAULT, PASSES.kernel_id])
    assert searches_of(current).step(PLAIN, PASSES.kernel_id, Searched(rows)) is None
    assert searches_of(current).proposals(norm(9), PASSES.kernel_id, Searched(rows)) != ()


def test_a_search_that_is_not_over_proposes_nothing(tmp_path: Path) -> None:
    rows = searched_at(tmp_path, [PLAIN])
    half = Searched(row for row in rows if row.contest_id == rows[0].contest_id)
    searches = searches_of(ClockedDevice([DEFAULT, PASSES.kernel_id]))
    assert searches.proposals(norm(9), PASSES.kernel_id, half) == ()
    found = searches.proposals(norm(9), PASSES.kernel_id, Searched(rows))
    assert found[0].choice == (PASSES.kernel_id, text_of({"order": "rows", "passes": 4}))
    assert found[0].log_ratio == pytest.approx(math.log(1 / 5))
    assert found[0].octaves == pytest.approx(math.log2(9 / 8))
    assert searches.proposals(norm(8 * 9), PASSES.kernel_id, Searched(rows)) == ()


def test_ratios_are_to_the_kernels_own_choice_of_the_same_contest() -> None:
    device = ClockedDevice([PASSES.kernel_id])
    first = first_step(device, PLAIN, PASSES.kernel_id)
    slow, _ = device.measure(first)
    device.cost = lambda configuration: 3.0 * cost(configuration)
    slower, _ = device.measure(replace(first, repeat=1))
    expected = trials_of(slow)
    found = trials_of([*slower, *slow])
    assert [trial.configuration for trial in found] == [trial.configuration for trial in expected]
    for trial, other in zip(found, expected, strict=True):
        assert (trial.log_ratio is None) == (trial.configuration["order"] == "broken")
        assert trial.log_ratio is None or trial.log_ratio == pytest.approx(other.log_ratio)
        assert trial.time_ns == other.time_ns


def test_without_a_time_of_the_kernels_own_choice_there_is_no_ratio() -> None:
    device = ClockedDevice([PASSES.kernel_id])
    rows, _ = device.measure(first_step(device, PLAIN, PASSES.kernel_id))
    failed = [
        replace(row, status="failed", screen_ns=None, samples_ns=()) if not row.configuration else row for row in rows
    ]
    found = trials_of(failed)
    assert len(found) == len(rows) - 1
    assert all(trial.log_ratio is None for trial in found)
