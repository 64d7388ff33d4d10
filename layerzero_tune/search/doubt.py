"""Whether what was measured at a point leaves a doubt that another contest may settle."""

from __future__ import annotations

from collections.abc import Sequence

from layerzero_tune.compile.distrust import disturbed_points
from layerzero_tune.compile.judge import Choice, Verdict, judge
from layerzero_tune.results.measurement import Measurement

# Log time. Two contests at one point differ by a standard deviation of 0.02 in the log of a ratio, more than the
# intervals of either say (memory lies elsewhere, a machine drifts): a rival this close may be the better one, or be
# shown to be slower than the default in one tuning and not in the next.
CLOSE = 0.05


def leaves_doubt(rows: Sequence[Measurement]) -> bool:
    """Whether every contest at the point, of which these are all rows, was disturbed, or another choice comes close to
    the best; false where nothing has a time."""
    return bool(disturbed_points(rows)) or any(
        len(close_choices(verdict)) > 1 for verdicts in judge(rows).values() for verdict in verdicts
    )


def close_choices(verdict: Verdict) -> frozenset[Choice]:
    """The choices that come close to the best, it among them."""
    close = (
        choice
        for choice, standing in verdict.standings.items()
        if standing.rounds > 0 and verdict.regret(choice) < CLOSE
    )
    return frozenset({verdict.best, *close})
