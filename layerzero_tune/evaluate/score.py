"""The score of one shape: what the table's choice costs beside the best and beside the default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ResultsError
from layerzero_tune.compile.judge import describe_choice
from layerzero_tune.evaluate.public_calls import PUBLIC_CALL
from layerzero_tune.identity import canonical_json
from layerzero_tune.measure.statistics import SLOWER_THRESHOLD, paired_log_ratio, slower_p_value
from layerzero_tune.results.measurement import Measurement


@dataclass(frozen=True)
class Score:
    """One held-out shape.

    Attributes:
        hit: whether the table answered; on a miss `chosen` is the live selector's plan.
        chosen: a kernel, with its configuration where that is not its own choice, as `describe_choice` has it.
        best: the fastest of the odd rounds.
        efficiency: best time / chosen time in the even rounds, so that luck in picking the best is not rewarded.
        speedup: default's time / chosen time in the even rounds.
        end_to_end: default's time / time of the public call, None where it was not measured.
        slower_p: p-value of "the choice is more than 2% slower than the default"; 1.0 where it is the default.
    """

    context: SelectionContext
    hit: bool
    chosen: str
    best: str
    default_ns: float
    efficiency: float
    speedup: float
    end_to_end: float | None
    slower_p: float


def score(rows: Sequence[Measurement], chosen: str, hit: bool) -> Score:
    """Score the choice on one contest's rows.

    Raises:
        ResultsError: the choice or the default has no time.
    """
    timed = {_name(row): row.samples_ns for row in rows if row.status == "ok" and row.samples_ns}
    default = next((_name(row) for row in rows if row.is_default), "")
    for name in (chosen, default):
        if name not in timed:
            status = next((f"{row.status} {row.message}" for row in rows if _name(row) == name), "not in the contest")
            raise ResultsError(f"{name!r} has no time at {rows[0].context.to_dict()}: {status}")
    odd = {name: median(samples[0::2]) for name, samples in timed.items() if name != PUBLIC_CALL}
    even = {name: median(samples[1::2]) for name, samples in timed.items()}
    best = min(odd, key=lambda name: (odd[name], name))
    return Score(
        context=rows[0].context,
        hit=hit,
        chosen=chosen,
        best=best,
        default_ns=even[default],
        efficiency=even[best] / even[chosen],
        speedup=even[default] / even[chosen],
        end_to_end=even[default] / even[PUBLIC_CALL] if PUBLIC_CALL in even else None,
        slower_p=slower_p_value(timed[chosen], timed[default]),
    )


def has_time(rows: Sequence[Measurement], chosen: str) -> bool:
    """Whether the choice and the default have final rounds in a contest."""
    timed = [row for row in rows if row.status == "ok" and row.samples_ns]
    return chosen in map(_name, timed) and any(row.is_default for row in timed)


def confirms_slower(rows: Sequence[Measurement], chosen: str) -> bool:
    """Whether a remeasurement puts the choice above the threshold again.

    The first measurement was significant; this one tells a slow choice from a disturbed contest.
    """
    timed: Mapping[str, tuple[float, ...]] = {_name(row): row.samples_ns for row in rows if row.samples_ns}
    default = next(_name(row) for row in rows if row.is_default)
    if chosen not in timed or default not in timed:
        return False
    return paired_log_ratio(timed[chosen], timed[default]).ratio > SLOWER_THRESHOLD


def _name(row: Measurement) -> str:
    if row.kernel_id == PUBLIC_CALL:  # its configuration says what serves it
        return PUBLIC_CALL
    return describe_choice((row.kernel_id, canonical_json(dict(row.configuration))))
