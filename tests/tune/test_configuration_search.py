"""Searches in a run: contests of configurations until each is over, then the contest of all kernels."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernel import Configuration
from layerzero_runtime.registry import Registry
from layerzero_tune.compile.distrust import disturbed_contests, disturbed_points
from layerzero_tune.compile.judge import judge
from layerzero_tune.measure.contest import Candidate, Contest, ContestOutcome, JobOutcome
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.configurations.bound import memory_bound_ns
from layerzero_tune.search.configurations.point import contest_at
from layerzero_tune.search.configurations.searched import Searched
from layerzero_tune.search.configurations.trial import text_of, trials_of
from layerzero_tune.search.device import RecordedDevice, rows_of
from layerzero_tune.search.jobs import JobIdentity, contest_of, legal_candidates
from tests.tune.clocked_device import KERNELS, POLICY, SEARCH, ClockedDevice, cost, run
from tests.tune.command import tune as tune_command
from tests.tune.configured_kernels import MANY, OWN_PASSES, PASSES
from tests.tune.synthetic_results import DEVICE, full, norm
from tests.tune.tuning_runs import Seen, planned_at, run_at

PLAIN = norm(8)


def configurations(contest: Contest, kernel_id: str) -> list[Configuration]:
    return [c.configuration for c in contest.candidates if c.kernel_id == kernel_id]


def test_a_point_without_spaces_has_the_contest_that_it_always_had() -> None:
    kernels = [kernel for kernel in KERNELS if kernel.space is None]
    device = ClockedDevice([kernel.kernel_id for kernel in kernels])
    candidates = legal_candidates(Registry(kernels), PLAIN.with_device(DEVICE))
    expected = contest_of(PLAIN, candidates, {k.kernel_id: k for k in kernels}, JobIdentity(DEVICE, POLICY))
    assert device.contests(PLAIN, Searched()) == (expected,)
    assert device.contests(replace(PLAIN, dtype="float16"), Searched()) == () or candidates


def test_all_of_a_small_space_are_screened_and_the_best_meet_the_other_kernels(tmp_path: Path) -> None:
    device = ClockedDevice(["torch.rms_norm", "torch.rms_norm.fused", PASSES.kernel_id])
    store = ResultsStore(tmp_path)
    *searches, final = run(device, store, PLAIN)
    screened = [found for contest in searches for found in configurations(contest, PASSES.kernel_id)[1:]]
    assert len(screened) == len(set(map(text_of, screened))) == 9
    for contest in searches:
        assert contest.policy == replace(POLICY, rounds=0)
        assert contest.candidates[0].kernel_id == PASSES.kernel_id
        assert contest.candidates[0].configuration == {}
        assert {candidate.kernel_id for candidate in contest.candidates} == {PASSES.kernel_id}
    assert final.policy == POLICY
    assert [candidate.kernel_id for candidate in final.candidates if not candidate.configuration] == [
        "torch.rms_norm",
        PASSES.kernel_id,
        "torch.rms_norm.fused",
    ]
    assert configurations(final, PASSES.kernel_id)[1:] == [{"passes": 4, "order": "rows"}]
    assert run(device, store, PLAIN) == []


def test_a_run_that_was_stopped_anywhere_goes_on_with_the_same_contests(tmp_path: Path) -> None:
    whole = run(ClockedDevice(["torch.rms_norm", MANY.kernel_id]), ResultsStore(tmp_path / "whole"), PLAIN)
    assert sum(len(contest.candidates) - 1 for contest in whole[:-1]) == SEARCH.measurements
    for stop in (1, 6, len(whole) - 1):
        store = ResultsStore(tmp_path / str(stop))
        device = ClockedDevice(["torch.rms_norm", MANY.kernel_id])

        def interrupt(seen: Seen, stop: int = stop) -> None:
            if len(seen.finished_contests) == stop:
                raise KeyboardInterrupt

        seen = Seen(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_at(device, [PLAIN], store.directory, seen)
        measured = [finished.contest for finished in seen.finished_contests]
        assert measured + run(device, store, PLAIN) == whole


def test_a_search_begins_with_the_best_of_the_points_around(tmp_path: Path) -> None:
    device = ClockedDevice(["torch.rms_norm", MANY.kernel_id])
    far, near, here = norm(1), norm(1000), norm(900)
    store = ResultsStore(tmp_path)
    device.cost = lambda configuration: 1.0 + abs(configuration.get("passes", OWN_PASSES) - 9)
    run(device, store, far)
    device.cost = cost
    run(device, store, near)
    first = run(device, store, here)[0]
    begun = configurations(first, MANY.kernel_id)[1:]
    assert begun[0]["passes"] == 4
    assert begun[0]["tile"] == 64
    assert begun[1]["passes"] == 9


def test_a_search_near_another_ends_sooner_and_a_distant_one_does_not(tmp_path: Path) -> None:
    device = ClockedDevice(["torch.rms_norm", MANY.kernel_id])
    store = ResultsStore(tmp_path)
    for rows, expected in ((4096, SEARCH.measurements), (600, SEARCH.near_measurements), (9, SEARCH.measurements)):
        *searches, final = run(device, store, norm(rows))
        assert sum(len(contest.candidates) - 1 for contest in searches) == expected
        assert not final.is_search
    assert run(device, store, norm(9), norm(4096), norm(600)) == []


def test_points_of_one_run_begin_with_what_the_points_before_them_gave(tmp_path: Path) -> None:
    """A plan is made before anything is known; what is searched follows from what is known when it is measured."""
    device = ClockedDevice(["torch.rms_norm", MANY.kernel_id])
    measured = run(device, ResultsStore(tmp_path), norm(64), norm(65))
    second = [contest for contest in measured if contest.context == measured[-1].context]
    assert sum(len(contest.candidates) - 1 for contest in second[:-1]) == SEARCH.near_measurements
    best = {"passes": 4, "order": "a", "tile": 64}
    assert configurations(measured[-1], MANY.kernel_id)[1] == configurations(second[0], MANY.kernel_id)[1] == best


def test_a_kernel_whose_own_choice_has_no_time_is_not_searched_further(tmp_path: Path) -> None:
    class Failing(ClockedDevice):
        def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
            rows, outcome = super().measure(contest)
            return tuple(
                replace(row, status="failed", screen_ns=None, samples_ns=())
                if row.kernel_id == MANY.kernel_id and not row.configuration
                else row
                for row in rows
            ), outcome

    device = Failing(["torch.rms_norm", MANY.kernel_id])
    search, final = run(device, ResultsStore(tmp_path), PLAIN)
    assert (search.is_search, final.is_search) == (True, False)
    assert [candidate.configuration for candidate in final.candidates] == [{}, {}]


def test_a_disturbed_search_is_not_measured_again_and_the_contest_that_follows_is(tmp_path: Path) -> None:
    class Shared(ClockedDevice):
        def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
            rows, outcome = super().measure(contest)
            return tuple(replace(row, contention=0.0 if contest.repeat else 1.0) for row in rows), outcome

    device, store = Shared(["torch.rms_norm", PASSES.kernel_id]), ResultsStore(tmp_path)
    measured = run(device, store, PLAIN)
    assert [(contest.is_search, contest.repeat) for contest in measured] == [
        (True, 0),
        (True, 0),
        (False, 0),
        (False, 1),
    ]
    rows = store.read().rows
    assert disturbed_contests(rows) == {measured[2].contest_id}
    assert disturbed_points(rows) == frozenset()
    assert disturbed_points([row for row in rows if row.contest_id != measured[3].contest_id]) == {PLAIN}
    assert run(device, store, PLAIN) == []


def test_a_run_says_how_many_contests_are_left_at_least(tmp_path: Path) -> None:
    device, store = ClockedDevice(["torch.rms_norm", PASSES.kernel_id]), ResultsStore(tmp_path)
    seen = Seen()
    run_at(device, [norm(8), norm(9)], store.directory, seen)
    assert [finished.left for finished in seen.finished_contests] == [2, 2, 1, 1, 1, 0]


def test_a_recorded_search_is_replayed_whole(tmp_path: Path) -> None:
    recorded = ResultsStore(tmp_path / "recorded")
    run(ClockedDevice(["torch.rms_norm", PASSES.kernel_id]), recorded, *map(norm, range(8, 14)))
    device, replayed = RecordedDevice(recorded.read().rows), ResultsStore(tmp_path / "replayed")
    seen = Seen()
    run_at(device, device.contexts, replayed.directory, seen)
    assert sorted(finished.contest.contest_id for finished in seen.finished_contests) == sorted(recorded.contest_ids())
    assert replayed.read().rows == recorded.read().rows
    assert planned_at(device, device.contexts, replayed).missing == ()


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
    identity = JobIdentity(fast, POLICY)
    own = Candidate(MANY.kernel_id)
    first = contest_at(context, [own], kernels, identity, Searched(), SEARCH)

    def searched(shortest_ns: float) -> Searched:
        outcomes = tuple(JobOutcome("ok", screen_ns=shortest_ns * number) for number in range(1, 10))
        return Searched(rows_of(first, ContestOutcome(outcomes, "2026-03-01T00:00:00+00:00"), kernels, fast))

    assert contest_at(context, [own], kernels, identity, searched(0.3 * bound), SEARCH).is_search is False
    assert contest_at(context, [own], kernels, identity, searched(0.6 * bound), SEARCH).is_search is True


def test_keys_that_a_mask_hides_leave_no_bound() -> None:
    fast = DeviceSpec(platform="cuda", name="GPU", multiprocessors=4, bandwidth_bytes_per_s=1e12)
    call = replace(full(4, 3, batch_size=2), operation="attention.causal", seq_len_k=500, device=fast)
    assert memory_bound_ns(replace(call, causal_alignment="top_left")) is None
    aligned = memory_bound_ns(replace(call, causal_alignment="bottom_right"))
    assert call.head_dim is not None
    assert aligned == pytest.approx(2 * 4 * call.head_dim * (3 + 500) * 4 / 1e12 * 1e9)


def test_points_of_another_static_key_and_contests_of_all_kernels_begin_nothing(tmp_path: Path) -> None:
    device = ClockedDevice(["torch.rms_norm", MANY.kernel_id])
    store = ResultsStore(tmp_path)
    run(device, store, norm(64))
    searched = Searched(store.read().rows)
    [(octaves, rows)] = searched.around(MANY.kernel_id, norm(65))
    assert octaves == pytest.approx(math.log2(65 / 64))
    assert rows == searched.rows(MANY.kernel_id, norm(64))
    assert searched.around(MANY.kernel_id, norm(64)) == []
    assert searched.around(MANY.kernel_id, replace(norm(65), mode="graph")) == []
    assert searched.around("torch.rms_norm", norm(65)) == []
    assert all(row.is_search for row in searched.rows(MANY.kernel_id, norm(64)))


def test_results_of_another_source_do_not_count(tmp_path: Path) -> None:
    device = ClockedDevice(["torch.rms_norm", PASSES.kernel_id])
    store = ResultsStore(tmp_path)
    run(device, store, PLAIN)
    rows = [row for row in store.read().rows if row.is_search]
    older = [replace(row, job_id=row.job_id[::-1]) for row in rows]
    first = ClockedDevice(["torch.rms_norm", PASSES.kernel_id]).contests(PLAIN, Searched(older))
    assert first == device.contests(PLAIN, Searched())
    assert first != device.contests(PLAIN, Searched(rows))


def test_tables_are_made_from_the_contests_of_all_kernels_alone(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    run(ClockedDevice(["torch.rms_norm", PASSES.kernel_id]), store, PLAIN)
    rows = store.read().rows
    [[verdict]] = judge(rows).values()
    assert len(verdict.standings) == 3
    assert judge(row for row in rows if row.is_search) == {}


def test_ratios_are_to_the_kernels_own_choice_of_the_same_contest() -> None:
    device = ClockedDevice([PASSES.kernel_id])
    first = device.contests(PLAIN, Searched())[0]
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
    rows, _ = device.measure(device.contests(PLAIN, Searched())[0])
    failed = [
        replace(row, status="failed", screen_ns=None, samples_ns=()) if not row.configuration else row for row in rows
    ]
    found = trials_of(failed)
    assert len(found) == len(rows) - 1
    assert all(trial.log_ratio is None for trial in found)


def test_the_command_searches_on_this_machine(tmp_path: Path) -> None:
    """Real kernels and times, which on a busy machine say little: what counts is that nothing is left out."""
    workload = tmp_path / "workload.jsonl"
    workload.write_text(
        '{"operation": "norm.rms", "dtype": "float32", "mode": "eager", "rows": 64, "hidden_size": 512}\n'
    )
    command = ("run", "--device", "cpu", "--workload", workload, "--kernels", "tests.tune.configured_kernels")
    done = tune_command(*command, "--out", tmp_path / "results", "--json")
    assert done.returncode == 0, done.stderr
    rows = [row for row in ResultsStore(tmp_path / "results").read().rows if row.kernel_id == PASSES.kernel_id]
    tried = [row for row in rows if row.is_search and row.configuration]
    assert len({text_of(row.configuration) for row in tried}) == len(tried) == 9
    for row in tried:
        assert row.status == ("compile_failed" if row.configuration["order"] == "broken" else "ok")
        assert (row.screen_ns is None) == (row.status == "compile_failed")
        assert row.samples_ns == ()
    final = [row.configuration for row in rows if not row.is_search]
    assert {} in final
    assert {text_of(configuration) for configuration in final if configuration} <= {
        text_of(row.configuration) for row in tried if row.status == "ok"
    }
