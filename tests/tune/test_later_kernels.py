"""Kernels that come later than what is held: only they are measured, beside the default and what is best so far."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_tune.compile.judge import judge
from layerzero_tune.measure.contest import Candidate, Contest
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.jobs import contest_of_rows
from layerzero_tune.search.key_regret import UNKNOWN
from tests.tune.clocked_device import ClockedDevice, run
from tests.tune.configured_kernels import PASSES
from tests.tune.synthetic_results import norm
from tests.tune.tuning_runs import agenda_at, planned_at

DEFAULT, FUSED, VECTOR = "torch.rms_norm", "torch.rms_norm.fused", "torch.rms_norm.vector_norm"
POINT = norm(8)
# By kernel, in units of the default's time.
SPEEDS = {DEFAULT: 1.0, FUSED: 0.5, VECTOR: 0.8}


class Timed(ClockedDevice):
    speeds = SPEEDS

    def time(self, candidate: Candidate) -> float:
        return self.speeds.get(candidate.kernel_id, 2.0)


def ids(contest: Contest) -> list[str]:
    return [candidate.kernel_id for candidate in contest.candidates]


def test_a_kernel_that_comes_later_meets_the_default_and_the_best_alone(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    (first,) = run(Timed([DEFAULT, FUSED]), store, POINT)
    assert ids(first) == [DEFAULT, FUSED]
    (later,) = run(Timed([DEFAULT, FUSED, VECTOR]), store, POINT)
    assert ids(later) == [DEFAULT, FUSED, VECTOR]
    assert [candidate.is_anchor for candidate in later.candidates] == [False, True, False]
    assert run(Timed([DEFAULT, FUSED, VECTOR]), store, POINT) == []
    [[verdict]] = judge(store.read().rows).values()
    assert verdict.best == (FUSED, "{}")
    assert verdict.log_ratio((VECTOR, "{}")) == pytest.approx(-0.223, abs=0.001)


def test_the_best_so_far_is_no_candidate_twice_and_the_rest_is_not_measured_again(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    run(Timed([DEFAULT, VECTOR]), store, POINT)
    (later,) = run(Timed([DEFAULT, VECTOR, FUSED]), store, POINT)
    assert ids(later) == [DEFAULT, VECTOR, FUSED]
    (last,) = [c for c in run(Timed([DEFAULT, VECTOR, FUSED, PASSES.kernel_id]), store, POINT) if not c.is_search]
    assert ids(last) == [DEFAULT, FUSED, PASSES.kernel_id]


def test_without_a_kernel_that_was_measured_the_point_is_done(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    run(Timed([DEFAULT, FUSED, VECTOR]), store, POINT)
    assert run(Timed([DEFAULT, FUSED]), store, POINT) == []
    plan = planned_at(Timed([DEFAULT, FUSED]), [POINT], store)
    assert (plan.found, plan.missing, plan.without_candidates) == (1, (), ())


def test_results_of_another_source_of_every_kernel_are_no_beginning(tmp_path: Path) -> None:
    """Nothing of them may be compared with."""
    store = ResultsStore(tmp_path)
    (whole,) = run(Timed([DEFAULT, FUSED]), store, POINT)
    older = ResultsStore(tmp_path / "older")
    older.append([replace(row, job_id=row.job_id[::-1], contest_id="0" * 32) for row in store.read().rows])
    assert run(Timed([DEFAULT, FUSED]), older, POINT) == [whole]


def test_a_later_contest_is_repeated_where_it_leaves_a_doubt(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    run(Timed([DEFAULT, FUSED]), store, POINT)
    device = Timed([DEFAULT, FUSED, VECTOR])
    device.speeds = SPEEDS | {VECTOR: 0.49}
    contests = run(device, store, POINT)
    assert [contest.repeat for contest in contests] == [0, 1, 2]
    assert len({contest.job_ids for contest in contests}) == 1
    assert run(device, store, POINT) == []


POINTS = [norm(rows, width) for rows in (1, 8, 64) for width in (512, 1024)]


def test_kernels_that_come_later_go_before_what_is_in_doubt_where_they_may_win(tmp_path: Path) -> None:
    """With a budget the points at which another contest might tell more would take it all."""
    store = ResultsStore(tmp_path)
    close = SPEEDS | {FUSED: 0.99}
    device = Timed([DEFAULT, FUSED])
    device.speeds = close
    run(device, store, *POINTS)
    device = Timed([DEFAULT, FUSED, VECTOR])
    device.speeds = close
    agenda = agenda_at(device, POINTS, store, refine=True)
    planned = agenda.next()
    assert planned is not None
    assert planned.regret == pytest.approx(UNKNOWN)
    for _ in POINTS:
        assert planned is not None
        assert VECTOR in ids(planned.contest)
        rows, _ = device.measure(planned.contest)
        agenda.learn(planned, rows)
        planned = agenda.next()


def test_where_a_later_kernel_has_lost_all_around_it_comes_late(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    run(Timed([DEFAULT, FUSED]), store, *POINTS)
    device = Timed([DEFAULT, FUSED, VECTOR])
    device.speeds = SPEEDS | {VECTOR: 2.0}
    agenda = agenda_at(device, POINTS, store)
    first = agenda.next()
    assert first is not None
    rows, _ = device.measure(first.contest)
    agenda.learn(first, rows)
    second = agenda.next()
    assert second is not None
    assert second.regret < 0.1 * first.regret


def test_rows_of_a_changed_source_say_nothing_of_what_is_left(tmp_path: Path) -> None:
    """Else its points would seem done, and come last."""
    run(Timed([DEFAULT, FUSED]), ResultsStore(tmp_path / "new"), *POINTS)
    held = ResultsStore(tmp_path / "new").read().rows
    older = ResultsStore(tmp_path / "older")
    for point in POINTS:
        rows = [row for row in held if row.context == point]
        jobs = [row.job_id[::-1] if row.kernel_id == FUSED else row.job_id for row in rows]
        contest_id = replace(contest_of_rows(rows), job_ids=tuple(jobs)).contest_id
        older.append([replace(row, job_id=job, contest_id=contest_id) for row, job in zip(rows, jobs, strict=True)])
    device = Timed([DEFAULT, FUSED])
    planned = agenda_at(device, POINTS, older).next()
    assert planned is not None
    assert planned.regret == pytest.approx(UNKNOWN)
    assert FUSED in ids(planned.contest)
    assert agenda_at(device, POINTS, ResultsStore(tmp_path / "new")).next() is None
