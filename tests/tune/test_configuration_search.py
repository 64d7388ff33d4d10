"""Searches in a run: every kernel's own choice first, searches at few points, what they find measured at all."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration
from layerzero_runtime.registry import Registry
from layerzero_tune.compile.distrust import disturbed_contests, disturbed_points
from layerzero_tune.compile.judge import judge
from layerzero_tune.measure.contest import Contest, ContestOutcome
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.configurations.searched import Searched
from layerzero_tune.search.configurations.trial import text_of
from layerzero_tune.search.jobs import JobIdentity, contest_of, legal_candidates
from layerzero_tune.search.recorded_device import RecordedDevice
from tests.tune.clocked_device import KERNELS, POLICY, SEARCH, ClockedDevice, cost, first_step, run, searches_of
from tests.tune.command import tune as tune_command
from tests.tune.configured_kernels import MANY, OWN_PASSES, PASSES
from tests.tune.synthetic_results import DEVICE, grid, norm
from tests.tune.tuning_runs import Seen, agenda_at, planned_at, run_at

PLAIN = norm(8)
DEFAULT = "torch.rms_norm"


def configurations(contest: Contest, kernel_id: str) -> list[Configuration]:
    return [c.configuration for c in contest.candidates if c.kernel_id == kernel_id]


def test_a_points_own_contest_holds_every_kernel_in_its_own_choice() -> None:
    device = ClockedDevice([kernel.kernel_id for kernel in KERNELS])
    candidates = legal_candidates(Registry(KERNELS), PLAIN.with_device(DEVICE))
    expected = contest_of(PLAIN, candidates, {k.kernel_id: k for k in KERNELS}, JobIdentity(DEVICE, POLICY))
    assert device.contests(PLAIN) == (expected,)
    assert device.contests(replace(PLAIN, dtype="float16")) == () or candidates


def test_all_of_a_small_space_are_screened_and_the_best_meet_what_is_best_so_far(tmp_path: Path) -> None:
    device = ClockedDevice([DEFAULT, "torch.rms_norm.fused", PASSES.kernel_id])
    store = ResultsStore(tmp_path)
    own, *searches, entry = run(device, store, PLAIN)
    assert own == device.contests(PLAIN)[0]
    screened = [found for contest in searches for found in configurations(contest, PASSES.kernel_id)[1:]]
    assert len(screened) == len(set(map(text_of, screened))) == 9
    for contest in searches:
        assert contest.policy == replace(POLICY, rounds=0)
        assert contest.candidates[0].kernel_id == PASSES.kernel_id
        assert contest.candidates[0].configuration == {}
        assert {candidate.kernel_id for candidate in contest.candidates} == {PASSES.kernel_id}
    assert entry.policy == POLICY
    default, *entrants = entry.candidates
    assert (default.kernel_id, default.is_default, default.configuration) == (DEFAULT, True, {})
    assert [found.configuration for found in entrants] == [{"passes": 4, "order": "rows"}]
    assert run(device, store, PLAIN) == []


def test_what_enters_meets_the_present_winner_as_an_anchor(tmp_path: Path) -> None:
    """Of two tuned kernels the second's configurations are compared with the first's, not with the default alone."""
    device = ClockedDevice([DEFAULT, PASSES.kernel_id, MANY.kernel_id])
    *_, last = run(device, ResultsStore(tmp_path), PLAIN)
    assert last.candidates[0].is_default
    anchors = [found for found in last.candidates if found.is_anchor]
    assert len(anchors) <= 1
    rows = ResultsStore(tmp_path).read().rows
    [[verdict]] = judge(rows).values()
    winners = {kernel_id for kernel_id, _ in verdict.tied}
    assert winners <= {PASSES.kernel_id, MANY.kernel_id}
    assert all(verdict.standings[choice].log_ratio == pytest.approx(-math.log(5)) for choice in verdict.tied)


def test_a_run_that_was_stopped_anywhere_goes_on_with_the_same_contests(tmp_path: Path) -> None:
    whole = run(ClockedDevice([DEFAULT, MANY.kernel_id]), ResultsStore(tmp_path / "whole"), PLAIN)
    assert sum(len(contest.candidates) - 1 for contest in whole[1:-1]) == SEARCH.measurements
    for stop in (1, 4, len(whole) - 1):
        store = ResultsStore(tmp_path / str(stop))
        device = ClockedDevice([DEFAULT, MANY.kernel_id])

        def interrupt(seen: Seen, stop: int = stop) -> None:
            if len(seen.finished_contests) == stop:
                raise KeyboardInterrupt

        seen = Seen(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_at(device, [PLAIN], store.directory, seen)
        measured = [finished.contest for finished in seen.finished_contests]
        assert measured + run(device, store, PLAIN) == whole


def test_few_points_are_searched_and_all_measure_what_was_found(tmp_path: Path) -> None:
    points = grid(norm, (8, 16, 32, 64, 4096), (1024, 2048))
    measured = run(ClockedDevice([DEFAULT, PASSES.kernel_id]), ResultsStore(tmp_path), *points)
    searched = {contest.context for contest in measured if contest.is_search}
    assert len(searched) == 4  # none has another within an octave
    assert sum(context.rows == 4096 for context in searched) == 1
    entered = Counter(c.context for c in measured if not c.is_search and configurations(c, PASSES.kernel_id)[-1])
    assert entered == dict.fromkeys(points, 1)


def test_a_point_is_measured_before_it_is_searched_and_the_bounds_before_all(tmp_path: Path) -> None:
    points = grid(norm, (8, 64, 512), (1024, 4096))
    measured = run(ClockedDevice([DEFAULT, PASSES.kernel_id]), ResultsStore(tmp_path), *points)
    assert {contest.context for contest in measured[:2]} == {norm(8, 1024), norm(512, 4096)}
    seen: set[SelectionContext] = set()
    for contest in measured:
        assert contest.context in seen or not contest.is_search
        seen.add(contest.context)


def test_a_kernel_that_is_far_behind_is_not_searched(tmp_path: Path) -> None:
    class Slow(ClockedDevice):
        factor = 1.0

        def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
            rows, outcome = super().measure(contest)
            return tuple(self.slowed(row) if row.kernel_id == PASSES.kernel_id else row for row in rows), outcome

        def slowed(self, row: Measurement) -> Measurement:
            times = tuple(time * self.factor for time in row.samples_ns)
            return replace(row, screen_ns=(row.screen_ns or 0.0) * self.factor, samples_ns=times)

    for factor, searched in ((1.1, True), (1.5, False)):
        device = Slow([DEFAULT, PASSES.kernel_id])
        device.factor = factor
        measured = run(device, ResultsStore(tmp_path / str(factor)), PLAIN)
        assert any(contest.is_search for contest in measured) == searched


def test_searches_that_find_nothing_make_others_less_likely(tmp_path: Path) -> None:
    points = grid(norm, (1, 64, 4096, 262144), (64, 4096, 262144))
    counts = []
    for found in (True, False):
        device = ClockedDevice([DEFAULT, PASSES.kernel_id])
        device.cost = cost if found else lambda configuration: 1.0 + 0.1 * bool(configuration)
        measured = run(device, ResultsStore(tmp_path / str(found)), *points)
        counts.append(len({contest.context for contest in measured if contest.is_search}))
    assert counts[0] == len(points)
    assert counts[1] < len(points)


def test_the_point_that_stands_for_most_is_searched_first(tmp_path: Path) -> None:
    points = [norm(rows) for rows in (1, 64, 128, 256, 65536)]
    measured = run(ClockedDevice([DEFAULT, PASSES.kernel_id]), ResultsStore(tmp_path), *points)
    first = next(contest for contest in measured if contest.is_search)
    assert first.context == norm(128)


def test_a_search_begins_with_the_best_of_the_points_around(tmp_path: Path) -> None:
    device = ClockedDevice([DEFAULT, MANY.kernel_id])
    far, near, here = norm(1), norm(1000), norm(300)
    store = ResultsStore(tmp_path)
    device.cost = lambda configuration: 1.0 + abs(configuration.get("passes", OWN_PASSES) - 9)
    run(device, store, far)
    device.cost = cost
    run(device, store, near)
    searched = Searched(store.read().rows)
    step = searches_of(device).step(here, MANY.kernel_id, searched)
    assert step is not None
    begun = configurations(step.contest, MANY.kernel_id)[1:]
    assert begun[0]["passes"] == 4
    assert begun[0]["tile"] == 64
    assert begun[1]["passes"] == 9


def test_a_search_near_another_ends_sooner_and_a_distant_one_does_not(tmp_path: Path) -> None:
    device = ClockedDevice([DEFAULT, MANY.kernel_id])
    store = ResultsStore(tmp_path)
    for rows, expected in ((4096, SEARCH.measurements), (1000, SEARCH.near_measurements), (9, SEARCH.measurements)):
        searched = [contest for contest in run(device, store, norm(rows)) if contest.is_search]
        assert sum(len(contest.candidates) - 1 for contest in searched) == expected
    assert run(device, store, norm(9), norm(4096), norm(1000)) == []


def test_a_kernel_whose_own_choice_has_no_time_is_not_searched(tmp_path: Path) -> None:
    class Failing(ClockedDevice):
        def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
            rows, outcome = super().measure(contest)
            return tuple(
                replace(row, status="failed", screen_ns=None, samples_ns=())
                if row.kernel_id == MANY.kernel_id and not row.configuration
                else row
                for row in rows
            ), outcome

    device = Failing([DEFAULT, MANY.kernel_id])
    (own,) = run(device, ResultsStore(tmp_path), PLAIN)
    assert not own.is_search
    rows, _ = device.measure(first_step(device, PLAIN, MANY.kernel_id))
    assert searches_of(device).step(PLAIN, MANY.kernel_id, Searched(rows)) is None
    assert searches_of(device).is_over(PLAIN, MANY.kernel_id, Searched(rows))


def test_a_disturbed_search_is_not_measured_again_and_what_enters_is(tmp_path: Path) -> None:
    class Shared(ClockedDevice):
        def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
            rows, outcome = super().measure(contest)
            is_quiet = contest.repeat or contest == self.contests(PLAIN)[0]
            return tuple(replace(row, contention=0.0 if is_quiet else 1.0) for row in rows), outcome

    device, store = Shared([DEFAULT, PASSES.kernel_id]), ResultsStore(tmp_path)
    measured = run(device, store, PLAIN)
    assert [(contest.is_search, contest.repeat) for contest in measured] == [
        (False, 0),
        (True, 0),
        (True, 0),
        (False, 0),
    ]
    rows = store.read().rows
    assert disturbed_contests(rows) == {measured[3].contest_id}
    assert disturbed_points(rows) == frozenset()
    assert run(device, store, PLAIN) == []


def test_a_close_verdict_between_what_entered_and_the_best_is_looked_at_again(tmp_path: Path) -> None:
    """By a repeat of the contest that holds them, also in a run that begins with it."""
    device, store = ClockedDevice([DEFAULT, MANY.kernel_id]), ResultsStore(tmp_path)
    device.cost = lambda configuration: 1.0 + 0.01 * abs(configuration.get("passes", 16) - 4)

    def at_the_first_repeat(seen: Seen) -> None:
        if seen.finished_contests[-1].contest.repeat:
            raise KeyboardInterrupt

    seen = Seen(at_the_first_repeat)
    with pytest.raises(KeyboardInterrupt):
        run_at(device, [PLAIN], tmp_path, seen)
    entry, first = (finished.contest for finished in seen.finished_contests[-2:])
    assert (first.contest_id, first.repeat) == (replace(entry, repeat=1).contest_id, 1)
    again = run(device, store, PLAIN)
    assert again[0].contest_id == replace(entry, repeat=2).contest_id
    assert run(device, store, PLAIN) == []


def test_a_run_says_how_many_contests_are_left_at_least(tmp_path: Path) -> None:
    device, store = ClockedDevice([DEFAULT, PASSES.kernel_id]), ResultsStore(tmp_path)
    seen = Seen()
    run_at(device, [norm(8), norm(9)], store.directory, seen)
    assert [finished.planned.kind for finished in seen.finished_contests] == [
        "point",
        "point",
        "search",
        "search",
        "entry",
        "entry",
    ]
    left = [finished.left for finished in seen.finished_contests]
    assert left[0] > 1
    assert all(left[:-1])
    assert left[-1] == 0


def test_a_plan_foresees_searches(tmp_path: Path) -> None:
    device = ClockedDevice([DEFAULT, PASSES.kernel_id])
    planned = agenda_at(device, [norm(8), norm(9), norm(4000)], ResultsStore(tmp_path)).forecast()
    assert Counter(found.kind for found in planned) == {"point": 3, "search": 2}
    searches = [found for found in planned if found.kind == "search"]
    points = [found for found in planned if found.kind == "point"]
    assert min(found.seconds for found in searches) > max(found.seconds for found in points)


def test_a_plan_foresees_each_entry_once(tmp_path: Path) -> None:
    device = ClockedDevice([DEFAULT, PASSES.kernel_id])

    def at_the_first_entry(seen: Seen) -> None:
        if seen.finished_contests[-1].planned.kind == "entry":
            raise KeyboardInterrupt

    points = [norm(8), norm(9), norm(10)]
    with pytest.raises(KeyboardInterrupt):
        run_at(device, points, tmp_path, Seen(at_the_first_entry))
    planned = agenda_at(device, points, ResultsStore(tmp_path)).forecast()
    assert Counter(found.kind for found in planned) == {"entry": 2}


def test_a_recorded_search_is_replayed_whole(tmp_path: Path) -> None:
    recorded = ResultsStore(tmp_path / "recorded")
    run(ClockedDevice([DEFAULT, PASSES.kernel_id]), recorded, *map(norm, range(8, 14)))
    device, replayed = RecordedDevice(recorded.read().rows), ResultsStore(tmp_path / "replayed")
    seen = Seen()
    run_at(device, device.contexts, replayed.directory, seen)
    assert sorted(finished.contest.contest_id for finished in seen.finished_contests) == sorted(recorded.contest_ids())
    assert replayed.read().rows == recorded.read().rows
    assert planned_at(device, device.contexts, replayed).missing == ()


def test_tables_are_made_from_the_contests_of_all_kernels_alone(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    run(ClockedDevice([DEFAULT, PASSES.kernel_id]), store, PLAIN)
    rows = store.read().rows
    [[verdict]] = judge(rows).values()
    assert len(verdict.standings) == 3
    assert judge(row for row in rows if row.is_search) == {}


@pytest.mark.alone
def test_the_command_searches_on_this_machine(tmp_path: Path) -> None:
    """Real kernels and times: the kernel's own choice, two passes, beats no other by far, so that it is searched."""
    workload = tmp_path / "workload.jsonl"
    workload.write_text(
        '{"operation": "norm.rms", "dtype": "float32", "mode": "eager", "rows": 64, "hidden_size": 512}\n'
    )
    command = ("run", "--device", "cpu", "--workload", workload, "--kernels", "tests.tune.configured_kernels")
    done = tune_command(*command, "--out", tmp_path / "results", "--json")
    assert done.returncode == 0, done.stderr
    rows = [row for row in ResultsStore(tmp_path / "results").read().rows if row.kernel_id == PASSES.kernel_id]
    tried = [row for row in rows if row.is_search and row.configuration]
    assert len({text_of(row.configuration) for row in tried}) == len(tried)
    for row in tried:
        assert row.status == ("compile_failed" if row.configuration["order"] == "broken" else "ok")
        assert (row.screen_ns is None) == (row.status == "compile_failed")
        assert row.samples_ns == ()
    final = [row.configuration for row in rows if not row.is_search]
    assert {} in final
    assert {text_of(configuration) for configuration in final if configuration} <= {
        text_of(row.configuration) for row in tried if row.status == "ok"
    }
