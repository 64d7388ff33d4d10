"""What a person sees of a run while it measures."""

from __future__ import annotations

import pytest

from layerzero_tune.command_line.output import duration_text
from layerzero_tune.command_line.run_progress import RunProgress
from layerzero_tune.search.budget import Deadline
from layerzero_tune.search.key_agenda import Planned
from layerzero_tune.search.recorded_device import RecordedDevice
from layerzero_tune.search.tuning import FinishedContest
from tests.tune.synthetic_results import Times, contest_rows, norm

FASTER = {"torch.rms_norm": 3000.0, "torch.rms_norm.fused": 2000.0}


def finished(times: Times) -> FinishedContest:
    rows = tuple(contest_rows(norm(8), times))
    (contest,) = RecordedDevice(rows).contests(norm(8))
    return FinishedContest(Planned("point", contest, 0.1, 1.0), rows, 2.0, 5)


def test_the_line_says_what_is_measured_and_what_came_before() -> None:
    progress = RunProgress(None, 3)
    planned = finished(FASTER).planned
    assert progress.line(planned) == "point norm.rms float32 8x1024"
    progress.finished(finished(FASTER))
    assert progress.line(planned) == "point norm.rms float32 8x1024, last: torch.rms_norm.fused 1.50x"
    progress.finished(finished({"torch.rms_norm": 3000.0, "torch.rms_norm.fused": 9000.0}))
    assert progress.line(planned).endswith(", last: torch.rms_norm")
    assert (progress.measured, progress.preparing_s, progress.kinds) == (2, 4.0, {"point": 2})


def test_crashes_and_the_budget_left_are_named() -> None:
    progress = RunProgress(Deadline.after(125.5), 3)
    progress.finished(finished(FASTER | {"torture.dies": "died", "torture.hangs": "timeout", "torture.wrong": "wrong"}))
    line = progress.line(finished(FASTER).planned)
    assert "budget left 2m05s" in line
    assert line.endswith("crashes 2")


def test_a_contest_without_any_time_says_so() -> None:
    progress = RunProgress(None, 1)
    progress.finished(finished({"torch.rms_norm": "failed"}))
    assert progress.line(finished(FASTER).planned).endswith("last: no kernel has a time")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0s"), (59.4, "59s"), (60.0, "1m00s"), (570.0, "9m30s"), (3900.0, "1h05m")]
)
def test_durations_read_as_the_option_takes_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
