"""Full speed: what was timed while the speed was lost is timed again, and how long that is waited for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.errors import ContextError
from layerzero_tune.measure import bench, contest_run, full_speed, processor_speed
from layerzero_tune.measure.full_speed import PATIENCE_S, PATIENCE_VARIABLE, FullSpeed, Patience
from layerzero_tune.measure.gpu_state import GpuWatch
from layerzero_tune.measure.processor_speed import MAX_LOSS, WINDOW_S, ProcessorSpeed, parallel_loop
from layerzero_tune.worker.kernels import load_kernels
from tests.tune.contests import contest


class Machine:
    """A machine whose parallel loop takes these times, looked at once a second."""

    def __init__(self, times: Sequence[float]) -> None:
        self.times = list(times)
        self.now = 0.0
        self.speed = ProcessorSpeed(self.take, lambda: self.now)

    def take(self) -> float:
        self.now += 1.0
        return self.times.pop(0)


def test_lost_speed_is_against_the_best_that_was_seen() -> None:
    machine = Machine([10.0, 8.0, 10.0, 8.0, 16.0])
    assert [machine.speed.lost() for _ in range(5)] == pytest.approx([0.0, 0.0, 0.2, 0.0, 0.5])


def test_a_speed_that_stays_is_the_machines_own() -> None:
    machine = Machine([8.0] + [10.0] * 2 * int(WINDOW_S))
    lost = [machine.speed.lost() for _ in range(int(WINDOW_S) + 3)]
    assert lost[1] == lost[int(WINDOW_S) - 1] == pytest.approx(0.2)
    assert lost[-1] == 0.0


@given(st.lists(st.tuples(st.sampled_from([1.0, 100.0, WINDOW_S]), st.floats(1.0, 4.0)), min_size=1, max_size=30))
def test_the_best_is_of_all_looks_of_the_window(looks: list[tuple[float, float]]) -> None:
    seen: list[tuple[float, float]] = []
    now = 0.0
    speed = ProcessorSpeed(lambda: seen[-1][1], lambda: now)
    for wait, took in looks:
        now += wait
        seen.append((now, took))
        lost = 1.0 - min(old for moment, old in seen if moment >= now - WINDOW_S) / took
        assert speed.lost() == (lost if lost > MAX_LOSS else 0.0)


def parts_of(machine: Machine, count: int, patience: Patience | None = None) -> tuple[list[int], FullSpeed]:
    """How often each of so many parts of a contest was taken, on a machine whose best speed is known."""
    machine.speed.lost()
    taken = [0] * count
    speed = FullSpeed(machine.speed, lambda: None, patience or Patience())
    speed.wait()
    for part in range(count):

        def take(part: int = part) -> int:
            taken[part] += 1
            return part

        assert speed.take(take) == part
    assert machine.times == []
    return taken, speed


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_speed, "others_share", lambda start, end: 0.0)
    monkeypatch.setattr(processor_speed, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("quiet")
def test_a_contest_waits_for_the_speed_of_the_machine() -> None:
    taken, speed = parts_of(Machine([8.0, 10.0, 10.0, 8.0, 8.0, 8.0]), 2)
    assert taken == [1, 1]
    assert speed.lost == 0.0


@pytest.mark.usefixtures("quiet")
def test_a_part_during_which_the_speed_was_lost_is_taken_again() -> None:
    taken, speed = parts_of(Machine([8.0, 8.0, 8.0, 10.0, 10.0, 8.0, 8.0, 8.0]), 3)
    assert taken == [1, 2, 1]
    assert speed.lost == 0.0


@pytest.mark.usefixtures("quiet")
def test_where_the_speed_stays_away_the_contest_goes_on_and_says_so() -> None:
    looks = int(PATIENCE_S / 0.25)
    taken, speed = parts_of(Machine([8.0, *[10.0] * looks, 10.0, 16.0, 8.0]), 3)
    assert taken == [1, 1, 1]
    assert speed.lost == pytest.approx(0.5)


@pytest.mark.usefixtures("quiet")
def test_a_contest_waits_half_as_long_as_one_that_waited_in_vain_until_the_speed_is_back() -> None:
    patience = Patience()
    for looks in (40, 20, 10):
        assert patience.seconds == 0.25 * looks
        parts_of(Machine([8.0, *[10.0] * looks, 10.0]), 1, patience)
    parts_of(Machine([8.0, 10.0, 8.0, 8.0]), 1, patience)
    assert patience.seconds == PATIENCE_S


@pytest.mark.usefixtures("quiet")
def test_the_environment_says_how_long_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "0.5")
    patience = Patience()
    parts_of(Machine([8.0, 10.0, 10.0, 10.0]), 1, patience)
    assert patience.seconds == 0.25
    monkeypatch.setenv(PATIENCE_VARIABLE, "0")
    taken, speed = parts_of(Machine([8.0, 10.0]), 1)
    assert taken == [1]
    assert speed.lost == pytest.approx(0.2)


@pytest.mark.parametrize("text", ["long", "-1", "inf", "nan"])
def test_a_patience_that_is_no_number_of_seconds_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, text)
    with pytest.raises(ContextError, match=f"LAYERZERO_PATIENCE is '{text}', required a number of seconds"):
        assert Patience().seconds


@pytest.mark.usefixtures("quiet")
def test_after_thousands_of_contests_in_vain_the_speed_is_still_seen() -> None:
    patience = Patience(in_vain=5000)
    assert patience.seconds == 0.0
    parts_of(Machine([8.0, 8.0]), 1, patience)
    assert patience.seconds == PATIENCE_S


@pytest.mark.usefixtures("quiet")
def test_a_part_that_was_taken_again_in_vain_costs_no_patience_of_the_next_contest() -> None:
    """The speed was there, and went again and again."""
    patience, parts = Patience(), int(PATIENCE_S / 0.25)
    parts_of(Machine([8.0, 8.0, *[10.0, 8.0] * (parts - 1), 10.0, 10.0]), 1, patience)
    assert patience.seconds == PATIENCE_S


@pytest.mark.usefixtures("quiet")
def test_a_part_is_not_taken_again_for_ever() -> None:
    parts = int(PATIENCE_S / 0.25)
    machine = Machine([8.0, 8.0, *[10.0, 8.0] * (parts - 1), 10.0, 10.0, 8.0])
    taken, speed = parts_of(machine, 2)
    assert taken == [parts + 1, 1]
    assert speed.lost == pytest.approx(0.2)


def test_nobody_waits_for_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_speed, "others_share", lambda start, end: 0.5)
    taken, speed = parts_of(Machine([8.0, 10.0, 10.0]), 1)
    assert taken == [1]
    assert speed.lost == pytest.approx(0.2)


def test_a_gpu_that_is_slow_is_waited_for_whatever_the_processors_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_speed, "others_share", lambda start, end: 0.5)
    monkeypatch.setattr(processor_speed, "sleep", lambda seconds: None)
    machine = Machine([8.0, 10.0, 10.0, 8.0, 8.0])
    monkeypatch.setattr(machine.speed, "is_of_processors", GpuWatch.is_of_processors, raising=False)
    taken, speed = parts_of(machine, 1)
    assert taken == [1]
    assert speed.lost == 0.0


@pytest.mark.usefixtures("quiet")
def test_a_part_that_takes_the_speed_by_its_own_load_is_not_taken_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([8.0, 8.0, *[10.0, 8.0] * 2, 10.0, 10.0, 8.0])
    monkeypatch.setattr(machine.speed, "is_of_load", lambda: True)
    taken, speed = parts_of(machine, 3)
    assert taken == [3, 1, 1]
    assert speed.is_own_load
    assert speed.lost == 0.0


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("times", "of_load", "parts"),
    [
        pytest.param([8.0, 10.0, 8.0, *[10.0] * 40], [True] * 50, 3, id="limited while nothing of ours runs"),
        pytest.param([8.0, *[10.0, 8.0] * 4, 8.0], [True, False, True, True] + [True] * 9, 5, id="hot in between"),
    ],
)
def test_what_else_takes_the_speed_is_not_the_load(
    monkeypatch: pytest.MonkeyPatch, times: list[float], of_load: list[bool], parts: int
) -> None:
    machine = Machine([8.0, *times])
    monkeypatch.setattr(machine.speed, "is_of_load", lambda: of_load.pop(0))
    (taken,), speed = parts_of(machine, 1)
    assert taken == parts
    assert not speed.is_own_load


@pytest.mark.usefixtures("quiet")
def test_a_long_part_that_takes_the_speed_by_its_own_load_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([8.0, 8.0, *[10.0, 8.0] * 2, 10.0])
    monkeypatch.setattr(machine.speed, "is_of_load", lambda: True)
    monkeypatch.setattr(full_speed, "perf_counter", count(step=PATIENCE_S).__next__)
    taken, speed = parts_of(machine, 1)
    assert taken == [3]
    assert speed.is_own_load


@pytest.mark.usefixtures("quiet")
def test_the_screening_and_every_round_of_a_contest_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([8.0, 8.0, 10.0, 8.0, 8.0, 8.0, 10.0, 8.0, 8.0, 8.0, 8.0])
    machine.speed.lost()
    steps: list[str] = []
    monkeypatch.setattr(contest_run, "others_share", lambda start, end: 0.0)
    monkeypatch.setattr(bench, "_parallel_speed", lambda: machine.speed)
    outcome = contest_run.measure_contest(
        contest("torch.rms_norm"), load_kernels(), progress=lambda candidate, step: steps.append(step)
    )
    assert machine.times == []
    assert outcome.contention == 0.0
    (job,) = outcome.outcomes
    assert len(job.samples_ns) == 4
    assert steps.count("round 1") == 1
    assert steps.count("round 2") == 2
    screenings = steps.count("screening")
    assert screenings
    assert screenings % 2 == 0


def test_a_contest_says_which_speed_it_lacked(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([8.0, *[10.0] * 7])
    machine.speed.lost()
    monkeypatch.setattr(full_speed, "others_share", lambda start, end: 0.5)
    monkeypatch.setattr(contest_run, "others_share", lambda start, end: 0.0)
    monkeypatch.setattr(bench, "_parallel_speed", lambda: machine.speed)
    assert contest_run.measure_contest(contest("torch.rms_norm"), load_kernels()).contention == pytest.approx(0.2)


def test_the_loop_takes_a_time() -> None:
    assert 100.0 < parallel_loop()() < 1e9
