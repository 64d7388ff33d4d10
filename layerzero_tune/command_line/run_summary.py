"""What a run says: before it measures, instead of measuring, and at its end with what to do next."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from layerzero_tune.command_line.output import duration_text, notes, print_table
from layerzero_tune.command_line.run_progress import RunProgress
from layerzero_tune.compile.distrust import disturbed_points
from layerzero_tune.measure.gpu_state import OWN_LOAD
from layerzero_tune.report.wins import kernel_wins
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.agenda import Agenda
from layerzero_tune.search.device import MAX_TAKES
from layerzero_tune.search.key_agenda import Kind, Planned
from layerzero_tune.search.shard import Shard
from layerzero_tune.search.tuning import TuningEnd, TuningPlan

_EXTRA: Mapping[Kind, str] = {
    "edge": "at edges",
    "probe": "probes",
    "repeat": "repeats",
    "search": "in searches of configurations",
    "entry": "of what these found",
}
# Until the worker process has imported torch nothing is measured.
STARTING_S = 5.0


def announce(
    name: str, plan: TuningPlan, agenda: Agenda, store: ResultsStore, budget_s: float | None, slots: int
) -> None:
    """What there is to do, and what the budget will not suffice for, measuring so many contests at once."""
    at_once = f", {slots} at once" if slots > 1 else ""
    notes.print(
        f"{name}{at_once}: {len(plan.missing)} contests to measure, {plan.found} held already in {store.directory}",
        soft_wrap=True,
    )
    if budget_s is None or not plan.missing:
        return
    expected_s = math.fsum(planned.seconds for planned in agenda.waiting()) / slots
    if expected_s > budget_s:
        fitting = round(len(plan.missing) * budget_s / expected_s)
        notes.print(
            f"they take about {duration_text(expected_s)}, the budget is {duration_text(budget_s)}: some "
            f"{len(plan.missing) - fitting} of them will be skipped, those that are expected to lower the regret least",
            soft_wrap=True,
        )


def announce_shard(shard: Shard, points: int, of: int) -> None:
    notes.print(
        f"shard {shard}: {points} of {of} points; layerzero-tune merge joins the {shard.count} shards", soft_wrap=True
    )


def forecast_of(plan: TuningPlan, agenda: Agenda, budget_s: float | None, slots: int) -> dict[str, Any]:
    """What would be measured, in how many seconds, so many contests at once; those that turn out to leave a doubt come
    on top."""
    waiting = agenda.waiting()
    planned = agenda.forecast(math.inf if budget_s is None else max(0.0, budget_s - STARTING_S) * slots)
    kernels = {candidate.kernel_id for one in planned for candidate in one.contest.candidates}
    return {
        "contests": len(planned),
        "contests_held": plan.found,
        "kernels": sorted(kernels),
        "seconds": STARTING_S * bool(planned) + math.fsum(one.seconds for one in planned) / slots,
        "kinds": dict(Counter(one.kind for one in planned)),
        "skipped": len(waiting) - sum(one.kind == "point" for one in planned),
        "operations": {
            name: {"contests": len(found), "seconds": math.fsum(one.seconds for one in found) / slots}
            for name, found in _by_operation(planned).items()
        },
    }


def print_dry_run(forecast: dict[str, Any]) -> None:
    print_table(
        "What would be measured",
        ("operation", "contests", "expected time"),
        [
            (name, str(found["contests"]), duration_text(found["seconds"]))
            for name, found in forecast["operations"].items()
        ],
    )
    notes.print(
        f"{forecast['contests']} contests{_extra_text(forecast['kinds'])} of {len(forecast['kernels'])} kernels, about "
        f"{duration_text(forecast['seconds'])}; {forecast['contests_held']} held already, {forecast['skipped']} "
        "that the budget leaves out; nothing was measured",
        soft_wrap=True,
    )


def print_summary(
    store: ResultsStore, rows: Sequence[Measurement], progress: RunProgress, end: TuningEnd, elapsed_s: float
) -> None:
    """What was measured, where each kernel wins, what has no time or was skipped, and what to do next."""
    notes.print(
        f"measured {progress.measured} contests{_extra_text(progress.kinds)} in "
        f"{elapsed_s - progress.preparing_s:.0f} s, beside {progress.preparing_s:.0f} s of loading "
        f"and compiling kernels; next: layerzero-tune compile {store.directory} --out TABLES",
        soft_wrap=True,
    )
    print_table(
        "Where each kernel wins",
        ("operation", "dtype", "kernel", "points", "best at", "largest gain over the default"),
        [
            (
                found.operation,
                found.dtype,
                found.kernel_id,
                str(found.points),
                str(found.wins),
                "-" if found.largest_gain is None else f"{found.largest_gain:.2f}x",
            )
            for found in kernel_wins(rows)
        ],
    )
    _print_failures(rows)
    if gpu := gpu_summary(rows):
        notes.print(_gpu_text(gpu), soft_wrap=True)
    if end.skipped:
        skipped = ", ".join(f"{name} {len(found)}" for name, found in _by_operation(end.skipped).items())
        notes.print(
            f"{len(end.skipped)} contests were skipped for want of time ({skipped}); the same command measures them",
            style="yellow",
            soft_wrap=True,
        )
    notes.print(
        f"expected regret of a table at the points asked for: {math.expm1(end.regret):.1%} on average, "
        f"{math.expm1(end.worst_regret):.1%} at the worst point",
        soft_wrap=True,
    )
    disturbed = len(disturbed_points(rows))
    if disturbed:
        notes.print(
            f"{disturbed} points were disturbed by other processes or by a drift of the machine, up to {MAX_TAKES} "
            "times over; measure on a quiet machine",
            style="yellow",
            soft_wrap=True,
        )


def _print_failures(rows: Sequence[Measurement]) -> None:
    failures: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            failures.setdefault((row.kernel_id, row.status), []).append(row.message)
    if failures:
        print_table(
            "Without a time",
            ("kernel", "status", "jobs", "first message"),
            [
                (kernel_id, status, str(len(messages)), messages[0])
                for (kernel_id, status), messages in sorted(failures.items())
            ],
        )


def gpu_summary(rows: Sequence[Measurement]) -> dict[str, Any]:
    """What the contests say of the GPU's state: medians, extremes, and how many kept times although it was slowed down,
    by reason, their own load among them; empty for a CPU, and where NVML did not answer."""
    contests = {row.contest_id: row.gpu for row in rows if row.gpu is not None and row.gpu["clock_mhz"] is not None}
    if not contests:
        return {}
    found = contests.values()

    def told(name: str) -> list[float]:
        return [gpu[name] for gpu in found if gpu[name] is not None]

    return {
        "clock_mhz": statistics.median(told("clock_mhz")),
        "lowest_clock_mhz": min(told("lowest_clock_mhz")),
        "highest_temperature_c": max(told("highest_temperature_c"), default=None),
        "highest_power_w": max(told("highest_power_w"), default=None),
        "slowed": dict(Counter(reason for gpu in found for reason in gpu["slowed"])),
    }


def _gpu_text(gpu: Mapping[str, Any]) -> str:
    parts = [f"its clock was {gpu['clock_mhz']:.0f} MHz (median), {gpu['lowest_clock_mhz']:.0f} MHz at the lowest"]
    if gpu["highest_temperature_c"] is not None:
        parts.append(f"up to {gpu['highest_temperature_c']:.0f} C")
    if gpu["highest_power_w"] is not None:
        parts.append(f"up to {gpu['highest_power_w']:.0f} W")
    told = {reason: f"{reason} in {count} contests" for reason, count in gpu["slowed"].items()}
    own = f"; at the limit of its power by {told.pop(OWN_LOAD)}" if OWN_LOAD in told else ""
    return f"the GPU: {', '.join(parts)}; slowed down in spite of waiting: {', '.join(told.values()) or 'never'}{own}"


def json_summary(
    plan: TuningPlan, rows: Sequence[Measurement], progress: RunProgress, end: TuningEnd, elapsed_s: float
) -> dict[str, Any]:
    """The same for machines."""
    return {
        "contests_measured": progress.measured,
        "contests_held": plan.found,
        "kinds": dict(progress.kinds),
        "skipped": len(end.skipped),
        "expected_regret": {"mean": end.regret, "largest": end.worst_regret},
        "measuring_s": elapsed_s - progress.preparing_s,
        "preparing_s": progress.preparing_s,
        "gpu": gpu_summary(rows),
        "statuses": dict(Counter(row.status for row in rows)),
        "points_without_candidates": [context.to_dict() for context in plan.without_candidates],
    }


def _extra_text(kinds: Mapping[Kind, int]) -> str:
    """How many of the contests are no points of the workload's own."""
    extra = ", ".join(f"{count} {_EXTRA[kind]}" for kind, count in sorted(kinds.items()) if kind != "point")
    return f" ({extra})" if extra else ""


def _by_operation(planned: Sequence[Planned]) -> dict[str, list[Planned]]:
    found: dict[str, list[Planned]] = {}
    for one in planned:
        found.setdefault(one.contest.context.operation, []).append(one)
    return found
