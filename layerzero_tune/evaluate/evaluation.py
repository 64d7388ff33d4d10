"""Measuring a table on held-out shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.snapshot import Snapshot
from layerzero_tune.evaluate.public_calls import PUBLIC_CALL
from layerzero_tune.evaluate.score import Score, confirms_slower, score
from layerzero_tune.measure.contest import Candidate, Contest
from layerzero_tune.measure.statistics import holm
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.device import LiveDevice


@dataclass(frozen=True)
class Evaluation:
    """What the held-out shapes gave.

    Attributes:
        slower: those scores that a remeasurement confirmed to be slower than the default.
        measured_to: the latest contest's time, UTC.
        preparation_s: seconds that loading and compiling kernels took, of contests measured in this call.
    """

    scores: tuple[Score, ...]
    slower: frozenset[Score]
    measured_to: str
    preparation_s: float


def evaluate(
    device: LiveDevice,
    snapshot: Snapshot,
    contexts: Sequence[SelectionContext],
    store: ResultsStore,
    table_id: str,
    progress: Callable[[SelectionContext], None] = lambda context: None,
) -> Evaluation:
    """Measure every legal kernel and the public call on each shape, and score what the snapshot selects.

    Contests that the store holds already are not measured again. `table_id` is a hash of the table's content: the
    public call through another table is another job.

    Raises:
        ResultsError: the store cannot be written, or a choice could not be timed.
    """
    held: dict[str, list[Measurement]] = {}
    if store.contest_ids():
        for row in store.read().rows:
            held.setdefault(row.contest_id, []).append(row)

    used: list[Measurement] = []
    preparation_s = 0.0

    def measured(contest: Contest) -> Sequence[Measurement]:
        nonlocal preparation_s
        if contest.contest_id not in held:
            rows, outcome = device.measure(contest)
            store.append(rows)
            held[contest.contest_id] = list(rows)
            preparation_s += outcome.preparation_s
        used.extend(held[contest.contest_id])
        return held[contest.contest_id]

    scores: list[Score] = []
    for context in contexts:
        plan = snapshot.select(context.with_device(device.spec))
        contest = _contest(device, context, plan.kernel_id, table_id, repeat=0)
        scores.append(score(measured(contest), plan.kernel_id, hit=plan.source == "table"))
        progress(context)
    suspects = holm([found.slower_p for found in scores]) if scores else ()
    slower = frozenset(
        found
        for found, is_suspect in zip(scores, suspects, strict=True)
        if is_suspect
        and confirms_slower(measured(_contest(device, found.context, found.chosen, table_id, repeat=1)), found.chosen)
    )
    store.compact()
    return Evaluation(tuple(scores), slower, max((row.measured_at for row in used), default=""), preparation_s)


def _contest(device: LiveDevice, context: SelectionContext, chosen: str, table_id: str, repeat: int) -> Contest:
    """All legal kernels and the public call; the choice reaches the final rounds whatever the screening says."""
    kernels = [
        Candidate(candidate.kernel_id, is_default=candidate.is_default, is_anchor=candidate.kernel_id == chosen)
        for candidate in device.candidates(context)
        if candidate.kernel_id != PUBLIC_CALL
    ]
    return device.contest(context, [*kernels, Candidate(PUBLIC_CALL, {"table": table_id}, is_anchor=True)], repeat)
